"""What `check_gradient` costs: a small MLP beside gradcheck, and a large one alone."""

import argparse
import functools
import importlib.metadata
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
from interleaved import duration, interleave, machine, rows, show

import jaxgrad
from jaxgrad.tables import Table

SMALL, SMALL_BATCH = (64, 128, 64, 10), 32
LARGE, LARGE_BATCH = (2048, 2048, 2048, 784, 10), 64
LAYER, ENTRY = 1, (3, 5)  # of its weight: off by its gradient's std
NATIVE, RIGHT, WRONG = "jit(value_and_grad)", "check_gradient", "one wrong entry"
COLUMNS = "", ">time", ">values", ">peak", ">beyond", ">goal"


def problem(sizes, batch):
    """`(params, x, labels)` in float32: a weight and a bias for each layer."""
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale))

    pairs = itertools.pairwise(sizes)
    params = [(draw(n, m, scale=(2 / n) ** 0.5), draw(m, scale=0.1)) for n, m in pairs]
    labels = jnp.asarray(rng.integers(0, sizes[-1], batch))
    return params, draw(batch, sizes[0]), labels


def new_loss(wrong=False):
    """A new function, for which nothing is compiled yet."""
    matmul = jax.custom_vjp(lambda x, weight: x @ weight)

    def backward(saved, cotangent):
        x, weight = saved
        right = x.T @ cotangent
        return cotangent @ weight.T, right.at[ENTRY].add(jnp.std(right))

    matmul.defvjp(lambda x, weight: (x @ weight, (x, weight)), backward)

    def loss(params, x, labels):
        for number, (weight, bias) in enumerate(params):
            x = jax.nn.relu(x) if number else x
            product = matmul if wrong and number == LAYER else jnp.matmul
            x = product(x, weight) + bias
        log_odds = jax.nn.log_softmax(x)
        return -jnp.mean(jnp.take_along_axis(log_odds, labels[:, None], 1))

    return loss


def elapsed(function, *operands):
    began = time.perf_counter()
    jax.block_until_ready(function(*operands))
    return time.perf_counter() - began


def check(operands, wrong):
    """A check, which must find the wrong entry and no other."""
    report = jaxgrad.check_gradient(new_loss(wrong), *operands)
    bad = [leaf for leaf in report.leaves if leaf.verdict == "wrong"]
    found = [(leaf.path, entry.index) for leaf in bad for entry in leaf.entries]
    assert found == ([(f"[{LAYER}][0]", ENTRY)] if wrong else []), report
    assert report.ok != wrong, report
    return report.evaluations


def small(rounds, slow):
    import torch

    torch.set_num_threads(1)  # more wait for each other, and for JAX's, up to a second
    params, *rest = operands = problem(SMALL, SMALL_BATCH)
    x, labels = (torch.tensor(np.asarray(array)) for array in rest)
    arrays = [np.asarray(array, float) for array in jax.tree.leaves(params)]
    leaves = [torch.tensor(array, requires_grad=True) for array in arrays]

    def twin(*leaves):
        out = x.double()
        for k in range(0, len(leaves), 2):
            out = (out.relu() if k else out) @ leaves[k] + leaves[k + 1]
        return torch.nn.functional.cross_entropy(out, labels.long())

    def gradcheck(fast_mode):
        torch.autograd.gradcheck(twin, leaves, fast_mode=fast_mode)

    base, ours = "gradcheck, fast mode", "check_gradient"
    broken = "check_gradient, one wrong entry, located"
    contestants = {
        base: lambda: elapsed(gradcheck, True),
        ours: lambda: elapsed(check, operands, False),
        broken: lambda: elapsed(check, operands, True),
    }
    interleave(contestants, 1)  # meets what only the first call does
    times = interleave(contestants, rounds)
    if slow:
        times["gradcheck, slow mode, once"] = [elapsed(gradcheck, False)] * rounds
        loss, said = functools.partial(new_loss(), x=rest[0], labels=rest[1]), "passes"
        began = time.perf_counter()
        try:
            jax.test_util.check_grads(loss, (params,), 1, ("rev",))
        except AssertionError:
            said = "a false alarm"
        seconds = time.perf_counter() - began
        times[f"check_grads, reverse mode, once: {said}"] = [seconds] * rounds
    title = "An MLP of 17,226 parameters: a new loss each time, compile included"
    goals = dict.fromkeys((ours, broken), "< 1 x gradcheck fast")
    show(title, rows(times, base, goals), "fast")


def alone(task, sizes):
    """What one task costs in this process, in which nothing else happens."""
    operands = problem(sizes, LARGE_BATCH)
    began = time.perf_counter()
    if task == NATIVE:
        jax.block_until_ready(jax.jit(jax.value_and_grad(new_loss()))(*operands))
    values = 1 if task == NATIVE else check(operands, task == WRONG)
    seconds = time.perf_counter() - began
    # Not getrusage's ru_maxrss, which starts at the size of the parent process.
    status = Path("/proc/self/status").read_text()
    return seconds, values, 1024 * int(status.partition("VmHWM:")[2].split()[0])


def large(sizes):
    told = {}
    for task in (NATIVE, RIGHT, WRONG):
        command = [sys.executable, __file__, "--alone", task, "--sizes"]
        told[task] = json.loads(subprocess.check_output([*command, *map(str, sizes)]))
    size = 8 * sum((n + 1) * m for n, m in itertools.pairwise(sizes))
    lines = []
    for task, (seconds, values, peak) in told.items():
        cells = duration(seconds), f"{values:,}", f"{peak / 1e6:,.0f} MB"
        beyond = f"{(peak - told[NATIVE][2]) / size:.2f}"
        lines.append([task, *cells, beyond, "" if task == NATIVE else "< 60 s, < 8"])
    note = (
        "Values: how often the loss was evaluated. Beyond: the peak beyond that of the "
        f"loss's own gradient, over the parameters' {size / 1e6:,.0f} MB in float64."
    )
    print(Table(f"An MLP of {size // 8:,} parameters", COLUMNS, lines, note))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--slow", action="store_true", help="gradcheck's slow mode and check_grads too")
    add("--rounds", type=int, default=9, help="of the small one; 0 leaves it out")
    add("--sizes", type=int, nargs="+", default=LARGE, help="the large one's widths")
    add("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return print(json.dumps(alone(options.alone, options.sizes)))
    print(machine(importlib.metadata.version("torch")), end="\n\n")
    if options.rounds:
        small(options.rounds, options.slow)
    large(options.sizes)


if __name__ == "__main__":
    main()
