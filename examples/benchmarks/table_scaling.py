"""What `large_table.py` costs: beside reading, by its rows, and beside PyTorch."""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from alone import beyond
from check_speed import elapsed
from interleaved import interleave

sys.path.append(str(Path(__file__).parents[1]))  # last: gpt.py is ours
import large_table
from table import people
from table.reading import as_numpy, open_table

SIZE = 1 << 13
"""The rows of a block, as `large_table.py` has them by default."""


READ, NUMPY = "pyarrow's read alone: the floor", "the read, and NumPy's X'X"
OURS = "large_table.read_moments"


class Kind(NamedTuple):
    """A table: what it's called, how it's written, and its target."""

    name: str
    write: Callable
    target: str


def write_wide(folder, rows):
    """Columns of float32 with mean 0 and deviation 1, and a target that they make."""
    folder = Path(folder)
    folder.mkdir()
    for number, (x, y) in enumerate(wide_parts(rows)):
        table = pa.table({f"x{i}": column for i, column in enumerate(x.T)} | {"y": y})
        path = folder / f"part-{number:05}.parquet"
        pq.write_table(table, path, row_group_size=1 << 16)


def wide_parts(rows, columns=128, rows_per_file=250_000):
    """The rows of `write_wide`, a file's at a time, each standardised."""
    draw = np.random.default_rng(0)
    true = draw.standard_normal(columns, np.float32)
    for first in range(0, rows, rows_per_file):
        count = min(rows_per_file, rows - first)
        x = draw.standard_normal((count, columns), np.float32)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        y = x @ true + draw.standard_normal(count, np.float32)
        yield x, (y - y.mean()) / y.std()


PEOPLE = Kind("7 columns of five types", people.make, "spend")
WIDE = Kind("129 float32 columns", write_wide, "y")


def reading(kind, folder, rounds):
    """Times to read a table: alone, with one X'X, and for its moments."""
    table = open_table(folder, kind.target)

    def read():
        return ds.dataset(folder).to_batches(columns=table.columns, batch_size=SIZE)

    def alone():
        return sum(batch.num_rows for batch in read())

    def with_numpy():
        total = 0
        for batch in read():
            z = np.array([as_numpy(column) for column in batch.columns], np.float32)
            total += z @ z.T
        return total

    def ours():
        return large_table.read_moments(table, SIZE, progress=False)

    runs = {READ: alone, NUMPY: with_numpy, OURS: ours}
    for run in runs.values():
        run()  # compiles, and brings the files into the machine's cache
    return interleave(
        {name: lambda run=run: elapsed(run) for name, run in runs.items()}, rounds
    )


def memory_to_read(few, many):
    """Seconds, and bytes at the peak, for the moments of `many` people."""
    for folder in (few, many):  # the few are read to compile
        table = open_table(folder, PEOPLE.target)
        took = beyond(lambda t=table: large_table.read_moments(t, SIZE, progress=False))
    return took


class Steps(NamedTuple):
    """Seconds of each way, and by how much what they reach differs."""

    reading: float
    descent: float
    torch: float
    difference: float


def thousand_steps(folder, rows, measured):
    """Full-batch steps on a wide table; PyTorch, with all in memory, makes but some."""
    table = open_table(folder, WIDE.target)
    begun = time.perf_counter()
    moments, frame = large_table.read_moments(table, SIZE, progress=False)
    reading = time.perf_counter() - begun
    fit = functools.partial(large_table.fit, table.columns, moments, frame)
    fit(steps=1)  # compiles
    begun = time.perf_counter()
    found = fit(steps=1000)
    descent = time.perf_counter() - begun

    ours = fit(steps=measured).coefficients
    seconds, theirs = torch_steps(rows, measured, 1 / found.curvature[1])
    difference = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    return Steps(reading, descent, seconds * 1000 / measured, difference)


def torch_steps(rows, steps, rate):
    """PyTorch's loop over all rows, from zero: seconds, and the weight that it gets."""
    import torch  # here: the other processes do without

    x, y = map(np.concatenate, zip(*wide_parts(rows), strict=True))
    x, y = torch.from_numpy(x), torch.from_numpy(y[:, None])
    layer = torch.nn.Linear(x.shape[1], 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()

    step()  # the first one
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - begun, layer.weight[0].detach().numpy()
