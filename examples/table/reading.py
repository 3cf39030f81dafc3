"""A folder of Parquet as blocks of rows; or what is wrong, by file, row and column."""

import contextlib
import math
import pathlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

FORMAT, LOCAL = ds.ParquetFileFormat(), LocalFileSystem()


class TableError(ValueError):
    """The table can't be fitted as it is: where, and why."""


@dataclass(frozen=True)
class Table:
    """The files of a table. All have these columns, of which the last is the target."""

    files: list[ds.ParquetFileFragment]
    columns: list[str]
    rows: int


class Frame(NamedTuple):
    """Each column is origin + unit * z."""

    origin: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Block:
    """Some rows of a table, as z in a frame of its own; a column is a row of z."""

    z: np.ndarray  # zeros after the first `rows`
    rows: int
    frame: Frame
    places: list[tuple[int, str, int]]  # from this row on: the file, and its row


# The files: what their schemas show is refused before a row is read.


def open_table(folder, target, without=()):
    """The Parquet files in `folder` and below it, in the order of their names."""
    paths = sorted(map(str, pathlib.Path(folder).rglob("*.parquet")))
    if not paths:
        raise TableError(f"{folder}: there is no .parquet file in it")
    files = [FORMAT.make_fragment(path, LOCAL) for path in paths]
    first, rows = {}, 0
    for file in files:
        with naming(file.path):
            schema, more = file.physical_schema, file.count_rows()
        rows += more
        if len(set(schema.names)) < len(schema.names):
            raise TableError(f"{file.path}: two of its columns have one name")
        types = {f.name: f.type for f in schema if f.name not in without}
        for name, kind in types.items():
            if not is_number(kind):
                raise TableError(not_a_number(file, name, kind))
        first = first or types
        for name in [*first, *types]:
            here, there = types.get(name, "absent"), first.get(name, "absent")
            if here != there:
                raise TableError(
                    f"{file.path}: column `{name}` is {here}, and {there} in "
                    f"{paths[0]}. Write both alike, or leave it out: --without {name}"
                )
    if target not in first:
        raise TableError(f"no column `{target}`: there are {', '.join(first)}")
    columns = [*(name for name in first if name != target), target]
    if not 1 < len(columns) < rows:
        raise TableError(f"{rows} rows of {len(columns)} columns are too few")
    return Table(files, columns, rows)


def is_number(kind):
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    number = pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal
    return pa.types.is_boolean(kind) or any(test(kind) for test in number)


def not_a_number(file, name, kind):
    """The value that shows why a column can't be taken."""
    row = 0
    with naming(file.path):
        for batch in file.to_batches(columns=[name]):
            for value in batch.column(0).to_pylist():
                try:
                    float(value)
                except (TypeError, ValueError):
                    return (
                        f"{file.path}, row {row}, column `{name}`: {value!r:.40} is no "
                        f"number ({kind}). Leave the column out: --without {name}"
                    )
                row += 1
    return f"{file.path}, column `{name}`: numbers, written as {kind}"


@contextlib.contextmanager
def naming(path, row=0):
    """Puts before pyarrow's words the file, and how far it was read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        where = f"{path}, row {row} or later" if row else path
        text = str(error).strip().splitlines()[0]
        raise TableError(f"{where}: cut short or damaged? {text}") from error


# Reading: record batches, of whatever size, become blocks of one size.


def read_blocks(files, columns, size, dtype):
    """All rows, in order. The last block may be short."""
    rows = 0
    for file in files:
        for first, batch in read_batches(file, columns, size):
            at = 0
            while at < len(batch[0]):
                if rows == 0:
                    # Aligned, so that a device on the CPU takes it without a copy.
                    memory = pa.allocate_buffer(len(columns) * size * dtype().itemsize)
                    z, places = np.frombuffer(memory, dtype).reshape(-1, size), []
                    frame = frame_of([column[at:] for column in batch])
                end = min(at + size - rows, len(batch[0]))
                places.append((rows, file.path, first + at))
                per_unit = 1 / frame.unit
                for to, column, origin, scale in zip(
                    z[:, rows : rows + end - at],
                    batch,
                    frame.origin.tolist(),
                    per_unit.tolist(),
                    strict=True,
                ):
                    part = column[at:end] - origin
                    np.multiply(part, scale, out=to, casting="same_kind")
                rows, at = rows + end - at, end
                if rows == size:
                    yield Block(z, rows, frame, places)
                    rows = 0
    if rows:
        z[:, rows:] = 0
        yield Block(z, rows, frame, places)


def read_batches(file, columns, size):
    """A row's number, and the columns from there on, as NumPy arrays; and so on."""
    row, batches = 0, scan(file, columns, size)
    while True:
        with naming(file.path, row):
            batch = next(batches, None)
        if batch is None:
            return
        for name, column in zip(columns, batch.columns, strict=True):
            if column.null_count:
                null = row + np.argmax(column.is_null().to_numpy(zero_copy_only=False))
                where = f"{file.path}, row {null}, column `{name}`"
                raise TableError(f"{where}: it is null")
        yield row, [as_numpy(column) for column in batch.columns]
        row += batch.num_rows


def scan(file, columns, size):
    """A file's record batches. While some row groups are used, the next are decoded.

    Left alone, pyarrow reads ahead up to a GiB, or all of a file.
    """
    options = ds.ParquetFragmentScanOptions(pre_buffer=False)
    next_ones, ids, rows = (), [], 0
    for group in [*file.row_groups, None]:
        if group is not None:
            ids.append(group.id)
            rows += group.num_rows
        if ids and (rows >= size or group is None):
            part = file.subset(row_group_ids=ids).scanner(
                columns=columns, batch_size=size, fragment_scan_options=options
            )
            these, next_ones = next_ones, part.to_batches()  # which starts to decode
            yield from these
            ids, rows = [], 0
    yield from next_ones


def as_numpy(column):
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_decimal(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.float64())
    return column.to_numpy(zero_copy_only=False)


def frame_of(columns):
    """Each column's middle, and a power of two as large as its spread, of a sample.

    Any other would be right too: float64 takes them back. These leave float32 its
    digits for what varies in incomes of millions, or in years of 2000 ± 5.
    """
    step = math.ceil(len(columns[0]) / 64)
    sample = np.sort(np.array([column[::step] for column in columns], float))
    origin = sample[:, sample.shape[1] // 2]
    spread = sample[:, -1] - sample[:, 0]
    for i in np.flatnonzero(spread == 0):  # rare values, or a constant
        spread[i] = float(columns[i].max()) - float(columns[i].min())
    most = [120 if column.dtype == np.float32 else 1000 for column in columns]
    unit = np.ldexp(1.0, np.clip(np.frexp(spread)[1], np.negative(most), most))
    usable = np.isfinite(spread) & (spread > 0)
    return Frame(np.where(np.isfinite(origin), origin, 0), np.where(usable, unit, 1))
