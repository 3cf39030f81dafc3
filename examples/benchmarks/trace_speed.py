"""What `trace_gradient` costs on a GPT: time beside `jit(grad)`, reading, and memory.

trace_speed.py                all: 5 minutes
trace_speed.py --rounds 1     less
"""

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from gpt import Sizes, new_loss, problem
from interleaved import duration, interleave, machine, rows, show

import jaxgrad
from jaxgrad.tables import Table

PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
NATIVE, OURS = "jit(grad)", "trace_gradient"
SMALL, LARGE = Sizes(), Sizes(width=256, batch=8, sequence=128)


def native(operands, sizes):
    return jax.block_until_ready(jax.jit(jax.grad(new_loss(sizes)))(*operands))


def ours(operands, sizes):
    trace = jaxgrad.trace_gradient(new_loss(sizes), *operands)
    jax.block_until_ready(trace.gradient)
    return trace


class Stopwatch:
    """Seconds of what is done inside, by JAX's phases, and how often it compiled."""

    def __enter__(self):
        self.spans = {phase: [] for phase in PHASES.values()}
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.began
        jax.monitoring.unregister_event_duration_listener(self._hear)
        self.compiled = len(self.spans["compile"])
        self.phases = {p: sum(s for _, s in spans) for p, spans in self.spans.items()}

    def _hear(self, event, seconds, **more):
        if event not in PHASES:
            return
        spans, start = self.spans[PHASES[event]], time.perf_counter() - seconds
        while spans and spans[-1][0] >= start:  # of a function inside of this one
            spans.pop()
        spans.append((start, seconds))


def timed(task, *operands):
    with Stopwatch() as watch:
        result = task(*operands)
    return watch, result


def first_call(sizes, rounds):
    operands = problem(sizes)
    watches = {NATIVE: [], OURS: []}

    def contestant(name, task):
        def run():
            jax.clear_caches()
            watches[name].append(timed(task, operands, sizes)[0])
            return watches[name][-1].seconds

        return run

    contestants = {NATIVE: contestant(NATIVE, native), OURS: contestant(OURS, ours)}
    interleave(contestants, 1)  # meets what only the first call does
    times = interleave(contestants, rounds)
    size = sum(x.size for x in jax.tree.leaves(operands[0]))
    title = (
        f"A GPT of {sizes.blocks} blocks and {size:,} parameters, {sizes.batch} x "
        f"{sizes.sequence} tokens: the first call of a new loss"
    )
    show(title, rows(times, NATIVE, {OURS: "≤ 2"}), "jit(grad)")

    lines = []
    for name, all_of_them in watches.items():
        chosen = all_of_them[-rounds:]
        parts = {
            phase: statistics.median(watch.phases[phase] for watch in chosen)
            for phase in PHASES.values()
        }
        rest = statistics.median(
            watch.seconds - sum(watch.phases.values()) for watch in chosen
        )
        compiled = str(statistics.median_low(watch.compiled for watch in chosen))
        cells = map(duration, (*parts.values(), max(rest, 0)))
        lines.append([name, *cells, compiled])
    columns = "", *(f">{phase}" for phase in PHASES.values()), ">rest", ">programs"
    note = "Rest: Python around them, and the run. Programs: how many were compiled."
    print(Table("Where the time goes", columns, lines, note))


READS = {
    "all values and cotangents": lambda trace: [
        (step.value, step.cotangent) for step in trace.steps
    ],
    "print(trace)": str,
    "trace.first_nonfinite": lambda trace: trace.first_nonfinite,
    "trace.blocked": lambda trace: trace.blocked,
    "trace.dead_entries": lambda trace: trace.dead_entries,
}


def outputs_of(trace):
    return [output for step in trace.steps for output in step.outputs]


def read(name, sizes):
    """What one read of a trace takes in this process, in which nothing was read."""
    trace = ours(problem(sizes), sizes)
    watch, _ = timed(READS[name], trace)
    return {
        "seconds": watch.seconds,
        "compile": watch.phases["compile"],
        "programs": watch.compiled,
        "steps": len(trace.steps),
        "kinds": len({(output.shape, output.dtype) for output in outputs_of(trace)}),
    }


def reading(sizes):
    lines = []
    for name in READS:
        told = alone(name, sizes)
        cells = duration(told["seconds"]), duration(told["compile"])
        goal = "" if lines else f"≤ {told['kinds']}"
        lines.append([name, *cells, str(told["programs"]), goal])
    title = (
        f"Reading its trace: {told['steps']:,} steps, with outputs of {told['kinds']} "
        "shapes and dtypes"
    )
    columns = "", ">time", ">of it compiling", ">programs", ">goal"
    print(Table(title, columns, lines, "Each in a process of its own."))


def memory_now(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def taken(name, sizes):
    """The bytes that a task takes in this process, in which nothing else happens."""

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    operands = jax.block_until_ready(problem(sizes))
    tiny = Sizes(1, 1, 8, 1, 8, 8)
    for task in (native, ours):
        task(problem(tiny), tiny)  # loads the compiler
    resident, arrays = memory_now("VmRSS"), held()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    result = (native if name == NATIVE else ours)(operands, sizes)
    told = {"peak": memory_now("VmHWM") - resident, "held": held() - arrays}
    if name == OURS:
        told["sum"] = sum(
            math.prod(output.shape) * jnp.dtype(output.dtype).itemsize
            for output in outputs_of(result)
        )
    return told


def alone(name, sizes):
    """What a read or a task takes, in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, *map(str, sizes)]
    return json.loads(subprocess.check_output(command))


def memory(sizes):
    told = {name: alone(name, sizes) for name in (NATIVE, OURS)}
    total = told[OURS]["sum"]
    lines = [
        [
            name,
            f"{of['peak'] / 1e6:,.0f} MB",
            f"{of['held'] / 1e6:,.0f} MB",
            f"{of['peak'] / total:.2f}",
            "≤ 3" if name == OURS else "",
        ]
        for name, of in told.items()
    ]
    note = (
        f"Times sum: of the intermediates' {total / 1e6:,.0f} MB, the outputs of all "
        "steps of the loss. Peak: the process's, beyond what it had before the call, "
        "with parameters and data; the compiler's share is in it. Held: the result's "
        "arrays."
    )
    title = f"Memory: {sizes.batch} x {sizes.sequence} tokens, width {sizes.width}"
    columns = "", ">peak", ">held", ">times sum", ">goal"
    print(Table(title, columns, lines, note))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="of the first call")
    add("--blocks", type=int, default=SMALL.blocks, help="of the GPT")
    add("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        name, *sizes = options.alone
        task = read if name in READS else taken
        return print(json.dumps(task(name, Sizes(*map(int, sizes)))))
    small, large = (sizes._replace(blocks=options.blocks) for sizes in (SMALL, LARGE))
    print(machine(importlib.metadata.version("torch")), end="\n\n")
    first_call(small, options.rounds)
    reading(small)
    memory(large)


if __name__ == "__main__":
    main()
