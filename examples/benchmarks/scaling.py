"""How time and memory grow with rows, devices and parameters; and beside others' loops.

scaling.py                       all: 12 minutes
scaling.py rows instruments      only these: minibatch rows devices instruments table
scaling.py --quick               tiny sizes, to see it run: its figures mean nothing
"""

import argparse
import importlib.metadata
import itertools
import math
import os
import statistics
import tempfile

import device_scaling
import instrument_scaling
import jax
import minibatch
import numpy as np
import table_scaling
from alone import LIMIT, elsewhere
from check_speed import elapsed
from gpt import Sizes
from instrument_scaling import CHECK, NATIVE, TRACE
from interleaved import duration, interleave, machine, rows
from table_scaling import PEOPLE, WIDE

import jaxgrad
from jaxgrad.tables import Table


def judged(value, goal):
    """Two cells: the goal, if there is one, and whether it's met."""
    if goal is None:
        return ["", ""]
    sign, bound = goal
    met = value <= bound if sign == "≤" else value >= bound
    return [f"{sign} {bound:g}", "met" if met else "missed"]


def show(title, columns, lines, note=""):
    print(Table(title, columns, lines, note), flush=True)


# Minibatches, beside loops by hand

TRAIN, LOOP = "jaxgrad.train", "a JAX loop of optax steps"
SCAN = "one lax.scan an epoch"
LOADER, COMPILED = "PyTorch eager, DataLoader", "PyTorch compiled, DataLoader"
# At most 1.05 of the loop's time is at least 0.95 the other way round.
LOOP_GOAL, MLP_GOALS = {LOOP: ("≥", 0.95)}, {LOOP: ("≥", 0.95), LOADER: ("≥", 5)}


def minibatches(quick):
    batches, rounds = (4, 1) if quick else (64, 7)
    mlp = minibatch.mlp((8, 32, 10), 256, batches)
    title = f"A step on an MLP of {mlp.size:,} parameters, a batch of 256 rows"
    one_task(title, mlp, 1 if quick else 8, rounds, MLP_GOALS, quick)
    if not quick:
        mlp = minibatch.mlp((64, 128, 64, 10), 256, batches)
        title = f"The same of {mlp.size:,} parameters: more arithmetic, less dispatch"
        one_task(title, mlp, 4, rounds, LOOP_GOAL, quick)
    sizes = Sizes(1, 2, 16, 2, 8, 16) if quick else Sizes(2, 4, 64, 8, 64, 256)
    gpt = minibatch.small_gpt(sizes, 2 if quick else 16)
    title = (
        f"A step on a GPT of {sizes.blocks} blocks and {gpt.size:,} parameters, a "
        f"batch of {sizes.batch} x {sizes.sequence} tokens"
    )
    one_task(title, gpt, 1 if quick else 2, rounds, LOOP_GOAL, quick)


def one_task(title, task, epochs, rounds, goals, quick):
    """A table of what a step takes, each way; all train the same model."""
    begun = [minibatch.loss_of(task, start) for start in (task.params, task.module)]
    assert math.isclose(*begun, rel_tol=1e-5), begun  # float32: one model
    steps = epochs * task.batches
    runs = {
        TRAIN: minibatch.by_train(task, epochs),
        f"{TRAIN}, one record": minibatch.by_train(task, epochs, record_every=steps),
        LOOP: minibatch.by_jitted_step(task, epochs),
        SCAN: minibatch.by_scan(task, epochs),
    }
    runs[LOADER] = minibatch.by_torch(task, epochs)
    indexed = minibatch.by_torch(task, epochs, minibatch.Indexed)
    runs["PyTorch eager, rows indexed"] = indexed
    compiled, why = None, "torch.compile takes too long for --quick."
    if not quick:
        compiled, why = minibatch.compiled_torch(task, epochs)
    if compiled:
        runs[COMPILED] = compiled
    reached = {}
    for name, run in runs.items():
        reached[name] = minibatch.loss_of(task, run())  # compiles
        # Not to the digit: they have the rows in different orders.
        assert math.isclose(reached[name], reached[TRAIN], rel_tol=0.01), reached
    timed = {n: lambda run=run: elapsed(run) / steps for n, run in runs.items()}
    lines = [
        [name, time, ratio, *judged(float(ratio), goals.get(name))]
        for name, time, ratio, _ in rows(interleave(timed, rounds), TRAIN)
    ]
    if not compiled:
        lines.append([COMPILED, *"--", "", ""])
    note = (
        "The loops in JAX shuffle by jax.random.permutation, which sorts all rows; "
        f"train computes where each row goes. {why}"
    )
    show(title, ["", ">median", ">times train", ">goal", ""], lines, note)


# Rows


def by_rows(quick):
    """Cost per row, from a thousand rows to ten million."""
    took, lines = [], []
    for batches in (4,) if quick else (4, 40, 400, 4_000, 40_000):
        task = minibatch.mlp((8, 32, 10), 256, batches)
        count = len(task.arrays[0])
        epochs = 1 if quick else math.ceil(1_000 / batches)
        gradient = jaxgrad.value_and_grad(task.loss)
        permutation = jax.jit(jax.random.permutation, static_argnums=1)
        runs = (
            (minibatch.by_train(task, epochs), epochs * count),
            (minibatch.by_train(task, epochs, shuffle_key=None), epochs * count),
            (lambda f=permutation, n=count: f(minibatch.KEY, n), count),
            (lambda f=gradient, t=task: f(t.params, *t.arrays), count),
        )
        seconds = []
        for run, size in runs:
            run()  # compiles
            seconds.append(statistics.median(elapsed(run) / size for _ in range(3)))
        took.append(seconds)
        lines.append([f"{count:,}", *map(duration, seconds)])
    spread = [f"{max(column) / min(column):.3g}" for column in zip(*took, strict=True)]
    lines.append(["largest / smallest", *spread])
    note = (
        "Train: an epoch, shuffled or in order, in batches of 256, over its rows. "
        "Permutation: of all rows, by jax.random alone, which train does without. "
        "Gradient: of all rows at once."
    )
    columns = [">rows", ">train", ">in order", ">permutation", ">gradient"]
    show("What a row costs, by how many there are", columns, lines, note)


# Devices


def by_devices(quick):
    """Weak scaling, where the devices are simulated."""
    sizes = ((1, 2), 2, 2, 1) if quick else ((1, 2, 4, 8), 64, 64, 7)
    flag = f"--xla_force_host_platform_device_count={max(sizes[0])}"
    told = elsewhere("device_scaling", "measure", *sizes, XLA_FLAGS=flag)
    if told is None:
        return print(f"Devices: more than {LIMIT} s.\n")
    lines = [
        [
            str(at["devices"]),
            f"{at['rows']:,}",
            duration(at["gradient"]),
            f"{at['of one']:.3g}",
            f"{at['of whole']:.3g}",
            duration(at["train"]),
            f"{at['train of one']:.3g}",
        ]
        for at in told
    ]
    note = (
        f"A gradient of {told[0]['rows']:,} rows a device, and train with "
        f"{device_scaling.BATCH} a device in each batch. Whole: the gradient of the "
        "same rows on one device. Simulated devices share this machine's "
        f"{os.cpu_count()} cores, so that more of them can't be faster: what is seen "
        "is what splitting costs, and 1 is nothing."
    )
    columns = [
        *(">devices", ">rows", ">gradient", ">over one", ">over whole"),
        *(">train", ">over one"),
    ]
    show("Weak scaling on simulated devices: what a row costs", columns, lines, note)


# Parameters

WIDTHS = (512, 768, 768, 10), (2048, 2432, 2048, 10), (4096, 8192, 8192, 10)


def by_parameters(quick):
    """What the instruments take, each in a process of its own."""
    lines = []
    for name in (NATIVE, CHECK, TRACE):
        told = []
        for widths in ((32, 64, 10),) if quick else WIDTHS:
            size = 4 * sum((n + 1) * m for n, m in itertools.pairwise(widths))
            found = elsewhere("instrument_scaling", "measure", name, widths)
            cells = [f"> {LIMIT} s", "-", "-"]
            if found:
                seconds, peak = found
                told.append((seconds, peak, size))
                cells = [duration(seconds), f"{peak / 1e6:,.0f} MB"]
                cells.append(f"{peak / size:.2f}")
            lines.append([name, f"{size // 4:,}", *cells])
        slopes = ["-", "-"]
        if len(told) > 1:
            *ys, x = np.log(np.maximum(told, 1e-9)).T
            slopes = [f"{np.polyfit(x, y, 1)[0]:.2f}" for y in ys]
        lines.append(["  slope", "", *slopes, ""])
    note = (
        f"An MLP on {instrument_scaling.BATCH} rows; a new loss, compilation "
        "included. Peak: beyond what there was before, with the parameters; of their "
        "bytes in float32. Slope: of the logarithm over that of the parameters; 1 is "
        "in proportion."
    )
    title = "The instruments, from one to a hundred million parameters"
    columns = ["", ">parameters", ">time", ">peak", ">of theirs"]
    show(title, columns, lines, note)


# A table larger than memory


def by_table(quick):
    """`large_table.py`: its time, its memory, and a thousand steps on what it read."""
    count, width, rounds = (20_000, 20_000, 1) if quick else (500_000, 1_000_000, 9)
    with tempfile.TemporaryDirectory() as folder:
        few, some, many, wide = (f"{folder}/{n}" for n in ("few", "some", "many", "x"))
        for path, number in ((few, 20_000), (some, count), (many, 10 * count)):
            PEOPLE.write(path, number)
        WIDE.write(wide, width)
        for kind, path, number in ((PEOPLE, many, 10 * count), (WIDE, wide, width)):
            reading_table(kind, path, number, rounds)
        memory_table(few, {some: count, many: 10 * count})
        steps_table(wide, width, 2 if quick else 20)


def reading_table(kind, folder, count, rounds):
    times = table_scaling.reading(kind, folder, rounds)
    lines = []
    for name, seconds in times.items():
        pairs = zip(times[table_scaling.NUMPY], seconds, strict=True)
        speed = statistics.median(a / b for a, b in pairs)
        goal = ("≥", 0.85) if name == table_scaling.OURS else None
        rate = f"{count / statistics.median(seconds):,.0f}"
        lines.append([name, rate, f"{speed:.3g}", *judged(speed, goal)])
    title = f"large_table.py: {count:,} rows of {kind.name}"
    note = (
        f"NumPy: in float32, on blocks of {table_scaling.SIZE:,} rows, as they are. "
        "Ours: centred and checked, summed in float64."
    )
    show(title, ["", ">rows a second", ">times NumPy", ">goal", ""], lines, note)


def memory_table(few, counts):
    lines, first = [], None
    for path, count in counts.items():
        seconds, peak = elsewhere("table_scaling", "memory_to_read", few, path)
        goal = first and ("≤", 1.1)
        first = first or peak
        cells = f"{count:,}", duration(seconds), f"{peak / 1e6:.0f} MB"
        lines.append([*cells, f"{peak / first:.2f}", *judged(peak / first, goal)])
    note = "Peak: beyond that of a process which has read a small table of the kind."
    columns = [">rows", ">time", ">peak", ">over the first", ">goal", ""]
    show("large_table.py's memory, for ten times the rows", columns, lines, note)


def steps_table(folder, count, measured):
    steps = table_scaling.thousand_steps(folder, count, measured)
    # PyTorch adds up all rows in float32; the moments are in float64.
    assert steps.difference < 1e-4, steps
    ours = steps.reading + steps.descent
    lines = [
        ["large_table.py: reads the table, once", duration(steps.reading)],
        ["large_table.py: 1,000 steps, on X'X", duration(steps.descent)],
        ["PyTorch eager: 1,000 steps, on all rows", duration(steps.torch)],
        ["PyTorch, over both of ours", f"{steps.torch / ours:.3g}"],
    ]
    note = (
        "Another algorithm for the same path, which only a quadratic loss has: X'X "
        "holds all that the rows say. PyTorch's rows are in memory from the start; "
        f"{measured} of its steps are measured, and multiplied. After these the "
        f"weights differ by {steps.difference:.0e}."
    )
    show(f"1,000 full-batch steps on {count:,} x 128", ["", ">time"], lines, note)


# The command

SECTIONS = {
    "minibatch": minibatches,
    "rows": by_rows,
    "devices": by_devices,
    "instruments": by_parameters,
    "table": by_table,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    add("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"no section `{name}`; there are {', '.join(SECTIONS)}")
    print(machine(importlib.metadata.version("torch")), end="\n\n", flush=True)
    for name in options.sections or SECTIONS:
        SECTIONS[name](options.quick)


if __name__ == "__main__":
    main()
