"""Linear regression on a table larger than memory: Parquet, read once, as a stream.

    python large_table.py                              a small table, made for it
    python large_table.py FOLDER --make 10000000       writes a large one
    python large_table.py FOLDER --target spend        fits it, or one of yours

Squared error is a quadratic in the parameters: how many rows there are, the columns'
sums and the sums of their products give the loss of all rows, and its gradient, at any
parameters. These moments add up over blocks, devices and processes, and descent looks
at no row again. Of several processes, each started with `--distributed HOST:PORT N I`
(on Slurm and Cloud TPU `--distributed` alone), each reads its share of the files.
"""

import argparse
import collections
import functools
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from table import people
from table.reading import Frame, TableError, as_numpy, open_table, read_blocks

import jaxgrad


class Moments(NamedTuple):
    """Sums over rows of z, the features and the target. In one frame, they add up."""

    n: Any  # rows
    sums: Any  # of z
    products: Any  # of z z': X'X, with X'y and y'y on its edge


@dataclass(frozen=True)
class Fit:
    """A linear regression, in the columns' own units."""

    coefficients: np.ndarray
    intercept: float
    r_squared: float
    curvature: tuple[float, float]  # the smallest and the largest; standardised columns
    steps: int


# The moments: each device sums its part of every block.


def read_moments(table, size=1 << 13, dtype=np.float32, devices=None, progress=None):
    """The moments of all rows, in float64, and their frame.

    Args:
      table: from `open_table`.
      size: the rows of a block. Few blocks are in memory at any time.
      dtype: of the blocks.
      devices: which share the rows of a block; `None`: all that this process has.
      progress: show a bar on stderr; `None`: if it is a terminal.
    """
    devices = tuple(devices or jax.local_devices())
    size = math.ceil(size / len(devices)) * len(devices)
    files = table.files[jax.process_index() :: jax.process_count()]
    shown = sys.stderr.isatty() if progress is None else progress

    def here():
        blocks = read_blocks(files, table.columns, size, dtype)
        rows = sum(file.count_rows() for file in files)
        blocks = with_bar(blocks, rows, shown and jax.process_index() == 0)
        return sum_blocks(blocks, table.columns, devices)

    with jax.enable_x64(True), np.errstate(all="ignore"):
        moments, frames = process_allgather(all_or_none(here))
    # All processes' moments, in the frame of the first that had any rows.
    pick = np.argmax(moments.n > 0)
    frame = Frame(frames.origin[pick], frames.unit[pick])
    shifts, scales = between(frames, frame)
    parts = map(moved, map(Moments, *moments), shifts, scales)
    return jax.tree.map(lambda *leaves: sum(leaves), *parts), frame


def sum_blocks(blocks, columns, devices):
    """The moments of blocks, in the frame of the first one."""
    add, split = on_devices(devices)
    width, count = len(columns), len(devices)
    shapes = (), (width,), (width, width)
    total = Moments(*(jnp.zeros((count, *shape), device=split) for shape in shapes))
    frame = None
    waiting = collections.deque()
    for block in blocks:
        frame = frame or block.frame
        each = block.z.shape[1] // count
        rows = np.clip(block.rows - each * np.arange(count), 0, each).astype(float)
        total, finite = add(total, block.z, rows, *between(block.frame, frame))
        # The devices may be busy with two blocks while we read the next.
        waiting.append((finite, block))
        if len(waiting) > 2:
            check(*waiting.popleft(), columns)
    for finite, block in waiting:
        check(finite, block, columns)
    total = Moments(*(np.asarray(leaf).sum(axis=0) for leaf in total))
    return total, frame or Frame(np.zeros(width), np.ones(width))


@functools.cache
def on_devices(devices):
    """`add_rows` for a block whose rows are split; and how the totals are split."""
    mesh = jax.make_mesh((len(devices),), ("rows",), (AxisType.Auto,), devices=devices)
    specs = P("rows"), P(None, "rows"), P("rows"), P(), P()
    add = jax.shard_map(add_rows, mesh=mesh, in_specs=specs, out_specs=P("rows"))
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(add, in_shardings=shardings), shardings[0]


def add_rows(total, z, rows, shift, scale):
    """On one device: the total with these rows; and whether all were finite."""
    products = jnp.dot(z, z.T, precision=jax.lax.Precision.HIGHEST)
    block = Moments(rows[0], z.sum(axis=1).astype(float), products.astype(float))
    total = jax.tree.map(lambda t, b: t + b, total, moved(block, shift, scale))
    return total, jnp.isfinite(jnp.trace(products))[None]


def moved(moments, shift, scale):
    """The moments of shift + scale * z."""
    n, sums, products = moments
    cross = (scale * sums)[:, None] * shift
    products = scale[:, None] * products * scale + cross + cross.T
    products += n * shift[:, None] * shift
    return Moments(n, scale * sums + n * shift, products)


def between(own, other):
    """The shift and the scale from one frame to another."""
    return (own.origin - other.origin) / other.unit, own.unit / other.unit


def check(finite, block, columns):
    if np.all(finite):
        return
    z = block.z[:, : block.rows]
    bad = ~(abs(z) < 1e15)  # their squares add up to less than float32's 3e38
    row = np.argmax(bad.any(axis=0))
    column = np.argmax(bad[:, row])
    begin, path, first = [place for place in block.places if place[0] <= row][-1]
    what = "nan" if np.isnan(z[column, row]) else "infinite, or far beyond the others"
    where = f"{path}, row {first + row - begin}, column `{columns[column]}`"
    raise TableError(f"{where}: it is {what}")


def all_or_none(stage):
    """What `stage` returns; or, in all processes, the first error of any of them."""
    result, text = None, ""
    try:
        result = stage()
    except TableError as error:
        text = str(error)
    texts = process_allgather(np.frombuffer(text.encode()[:2000].ljust(2000), np.uint8))
    for text in texts:
        if text := text.tobytes().decode(errors="replace").strip():
            raise TableError(text)
    return result


# Descent, on the moments alone.


def loss(params, moments):
    """The mean squared error of all rows."""
    v = jnp.append(-params.weight[0], 1.0)  # the residuals are v'z - bias
    bias = params.bias[0]
    squares = v @ moments.products @ v - 2 * bias * (v @ moments.sums)
    return squares / moments.n + bias**2


# The largest condition. The rounding of float32 blocks was seen to change coefficients
# by up to 1.4e-7 of it; with float64 it is the number of steps that counts.
MOST = {np.float32: 500, np.float64: 1e6}


def fit(columns, moments, frame, dtype=np.float32, steps=None):
    """Full-batch descent, by default until nothing but rounding is left to do."""
    n = moments.n
    mean = moments.sums / n
    covariance = moments.products / n - np.outer(mean, mean)
    deviation = np.sqrt(covariance.diagonal())
    means, deviations = frame.origin + frame.unit * mean, frame.unit * deviation
    for name, m, d in zip(columns, means, deviations, strict=True):
        if not d > 8 * np.finfo(float).eps * abs(m):
            raise TableError(
                f"column `{name}` is {m:g} in every row. Leave it out: --without {name}"
            )
    correlation = covariance / np.outer(deviation, deviation)
    standard = Moments(n, np.zeros_like(mean), n * correlation)

    # The curvature is the same at all parameters, and this is all of it.
    values, vectors = np.linalg.eigh(2 * correlation[:-1, :-1])
    smallest, largest = float(values[0]), float(values[-1])
    condition = largest / smallest if smallest > 0 else math.inf
    if condition > MOST[dtype]:
        share = abs(vectors[:, 0])
        names = [columns[i] for i in np.flatnonzero(share > share.max() / 10)]
        raise TableError(
            f"columns {', '.join(names)}: one follows from the others, or nearly "
            f"(condition {condition:.1e}). Leave one out: --without {names[-1]}"
            + (", or try --float64" if dtype == np.float32 else "")
        )
    # Each step leaves 1 - 1 / condition of the slowest error, and all leave e⁻²⁰.
    steps = math.ceil(20 * condition) if steps is None else steps
    with jax.enable_x64(True):
        start = jaxgrad.LinearParams(jnp.zeros((1, len(columns) - 1)), jnp.zeros(1))
        options = {"learning_rate": 1 / largest, "record_every": max(steps, 1)}
        result = jaxgrad.train(loss, start, standard, steps=steps, **options)
        unexplained = float(loss(result.params, standard))
    if result.stopped:
        raise TableError(f"no fit: {result.stopped}")
    weight, bias = (np.asarray(leaf) for leaf in result.params)
    coefficients = weight[0] * deviations[-1] / deviations[:-1]
    intercept = means[-1] + bias[0] * deviations[-1] - coefficients @ means[:-1]
    return Fit(coefficients, intercept, 1 - unexplained, (smallest, largest), steps)


def least_squares(table):
    """NumPy's, with all rows in memory; the intercept is the last."""
    parts = [file.to_table(columns=table.columns) for file in table.files]
    *x, y = (
        np.concatenate([as_numpy(c) for part in parts for c in part[name].chunks])
        for name in table.columns
    )
    x = np.column_stack([*x, np.ones(table.rows)]).astype(float)
    return np.linalg.lstsq(x, y)[0]


def with_bar(blocks, rows, shown):
    """The blocks; and on stderr, how many of the rows have come, and how fast."""
    if not shown:
        yield from blocks
        return
    speed = TextColumn("rows, {task.fields[speed]} a second")
    console = Console(stderr=True)
    with Progress(BarColumn(), MofNCompleteColumn(), speed, console=console) as bar:
        task = bar.add_task("", total=rows, speed="-")
        done, began = 0, time.perf_counter()
        for block in blocks:
            yield block
            done += block.rows
            speed = done / (time.perf_counter() - began)
            bar.update(task, completed=done, speed=f"{speed:,.0f}")


def report(table, options, compare=False):
    """Reads the table, fits it, and prints what came out."""
    dtype = np.float64 if options.float64 else np.float32
    began = time.perf_counter()
    moments, frame = read_moments(
        table, options.rows_per_block, dtype, progress=options.progress
    )
    seconds = time.perf_counter() - began
    found = fit(table.columns, moments, frame, dtype)
    if jax.process_index():
        return
    smallest, largest = found.curvature
    *features, target = table.columns
    print(f"{table.rows:,} rows in {len(table.files)} files, read in {seconds:.2f} s")
    print(f"curvature      {smallest:.4g} to {largest:.4g}, standardised")
    print(f"condition      {largest / smallest:.4g}: {found.steps} steps of full batch")
    print(f"learning rate  1 / {largest:.4g} = {1 / largest:.4g}")
    print(f"R²             {found.r_squared:.6f} of `{target}`\n")
    names, values = [*features, "(intercept)"], [*found.coefficients, found.intercept]
    if not compare:
        print(f"{'column':20}{'coefficient':>16}")
        for name, value in zip(names, values, strict=True):
            print(f"{name:20}{value:16.7g}")
        return
    print(f"{'column':20}{'coefficient':>16}{'numpy.linalg.lstsq':>22}{'digits':>9}")
    for name, ours, theirs in zip(names, values, least_squares(table), strict=True):
        digits = -math.log10(max(abs(ours / theirs - 1), 1e-15))
        print(f"{name:20}{ours:16.7g}{theirs:22.7g}{digits:9.1f}")
        assert digits >= 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", help="of .parquet files")
    parser.add_argument("--target", metavar="COLUMN", help="what to predict")
    parser.add_argument("--without", action="append", default=[], metavar="COLUMN")
    parser.add_argument("--rows-per-block", type=int, default=1 << 13, metavar="N")
    parser.add_argument("--float64", action="store_true", help="blocks in float64")
    parser.add_argument("--make", type=int, metavar="N", help="write a table of N rows")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction)
    parser.add_argument("--distributed", nargs="*", metavar="HOST:PORT N I")
    options = parser.parse_args()
    if options.distributed is not None:
        address, *numbers = options.distributed or [None]
        jax.distributed.initialize(address, *map(int, numbers))
    try:
        if options.folder is None:
            with tempfile.TemporaryDirectory() as folder:
                people.make(folder, 300_000, rows_per_file=100_000)
                report(open_table(folder, "spend"), options, compare=True)
        elif options.make:
            people.make(options.folder, options.make)
        elif options.target:
            target, without = options.target, options.without
            report(
                all_or_none(lambda: open_table(options.folder, target, without)),
                options,
            )
        else:
            parser.error("what is the --target, the column to predict?")
    except (TableError, OSError) as error:
        sys.exit(f"large_table.py: {error}")


if __name__ == "__main__":
    main()
