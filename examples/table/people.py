"""A table to try things on: what people are like, and what they spend."""

import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from table.reading import TableError


def make(folder, rows, rows_per_file=250_000):
    """Writes a table into an empty folder. A file with its name is a whole one."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise TableError(f"{folder}: it isn't empty; nothing was written")
    draw, partial = np.random.default_rng(0), folder / "partial"
    try:
        for number, first in enumerate(range(0, rows, rows_per_file)):
            people = make_people(draw, min(rows_per_file, rows - first))
            pq.write_table(people, partial, row_group_size=1 << 16)
            os.replace(partial, folder / f"part-{number:05}.parquet")
    finally:
        partial.unlink(missing_ok=True)


def make_people(draw, rows):
    born = draw.integers(1995, 2006, rows).astype(np.int16)
    hours = draw.normal(38, 6, rows).astype(np.float32)
    income = 25_000 * hours * draw.lognormal(0, 0.1, rows) + 20_000 * (2000.0 - born)
    member = draw.random(rows) < 0.3
    fee = np.round(draw.gamma(4, 25, rows) * (1 + member), 2)
    stars = draw.integers(1, 6, rows).astype(np.int8)
    spend = 0.002 * income - 90 * (born - 2000.0) + 25 * hours + 700 * member
    spend += 3 * fee - 150.0 * stars + draw.normal(0, 500, rows)
    return pa.table(
        {
            "born": born,
            "income": income,
            "hours": hours,
            "member": member,
            "fee": pa.array(fee).cast(pa.decimal128(12, 2), safe=False),
            "stars": pa.array(stars).dictionary_encode(),
            "spend": spend,
        }
    )
