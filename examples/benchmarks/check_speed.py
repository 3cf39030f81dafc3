"""What `jaxgrad.check_gradient` costs on an MLP, in seconds and in memory.

A small one beside PyTorch's gradcheck, and a large one, in a process of its own.
"""

import argparse
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
LAYER, ENTRY = 1, (3, 5)
"""The entry of this layer's weight is off by the root mean square of its gradient."""
NATIVE, RIGHT, WRONG = "jit(value_and_grad)", "check_gradient", "one wrong entry"


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

    @jax.custom_vjp
    def matmul(x, weight):
        return x @ weight

    def backward(saved, cotangent):
        x, weight = saved
        right = x.T @ cotangent
        off = jnp.sqrt(jnp.mean(right**2))
        return cotangent @ weight.T, right.at[ENTRY].add(off)

    matmul.defvjp(lambda x, weight: (x @ weight, (x, weight)), backward)

    def loss(params, x, labels):
        for number, (weight, bias) in enumerate(params):
            x = jax.nn.relu(x) if number else x
            product = matmul if wrong and number == LAYER else jnp.matmul
            x = product(x, weight) + bias
        log_odds = jax.nn.log_softmax(x)
        return -jnp.mean(jnp.take_along_axis(log_odds, labels[:, None], 1))

    return loss


def elapsed(function, *operands, **options):
    began = time.perf_counter()
    jax.block_until_ready(function(*operands, **options))
    return time.perf_counter() - began


def check(operands, wrong=False):
    """A check, which must find the wrong entry and no other."""
    report = jaxgrad.check_gradient(new_loss(wrong), *operands)
    bad = [leaf for leaf in report.leaves if leaf.verdict == "wrong"]
    found = [(leaf.path, entry.index) for leaf in bad for entry in leaf.entries]
    assert found == ([(f"[{LAYER}][0]", ENTRY)] if wrong else []), report
    assert report.ok != wrong, report
    return report.evaluations


def small(rounds, slow):
    import torch

    params, *rest = problem(SMALL, SMALL_BATCH)
    x, labels = (torch.tensor(np.asarray(array)) for array in rest)
    leaves = [torch.tensor(np.asarray(p, float)) for p in jax.tree.leaves(params)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def twin(*leaves):
        out = x.double()
        for number, (weight, bias) in enumerate(
            zip(leaves[::2], leaves[1::2], strict=True)
        ):
            out = (out.relu() if number else out) @ weight + bias
        return torch.nn.functional.cross_entropy(out, labels.long())

    def check_grads():
        loss = new_loss()
        jax.test_util.check_grads(lambda p: loss(p, *rest), (params,), 1, ("rev",))

    def gradcheck(fast_mode):
        return elapsed(torch.autograd.gradcheck, twin, leaves, fast_mode=fast_mode)

    base, ours = "gradcheck, fast mode", "check_gradient"
    broken = "check_gradient, one wrong entry, located"
    contestants = {
        base: lambda: gradcheck(True),
        ours: lambda: elapsed(check, [params, *rest]),
        broken: lambda: elapsed(check, [params, *rest], wrong=True),
    }
    interleave(contestants, 1)  # meets what only the first call does
    times = interleave(contestants, rounds)
    if slow:
        times["gradcheck, slow mode, once"] = [gradcheck(False)] * rounds
        times["check_grads, reverse mode, once"] = [elapsed(check_grads)] * rounds
    count = sum(leaf.numel() for leaf in leaves)
    title = f"An MLP of {count:,} parameters: each time a new loss, compile included"
    goal = "< 1 x gradcheck fast"
    show(title, rows(times, base, {ours: goal, broken: goal}), "fast")


def alone(task, sizes):
    """What one task costs in this process, in which nothing else happens."""
    operands, values = problem(sizes, LARGE_BATCH), 1
    began = time.perf_counter()
    if task == NATIVE:
        jax.block_until_ready(jax.jit(jax.value_and_grad(new_loss()))(*operands))
    else:
        values = check(operands, wrong=task == WRONG)
    seconds = time.perf_counter() - began
    # Not getrusage's ru_maxrss, which starts at the size of the parent process.
    status = Path("/proc/self/status").read_text()
    return seconds, values, 1024 * int(status.partition("VmHWM:")[2].split()[0])


def large(sizes):
    told = {}
    for task in (NATIVE, RIGHT, WRONG):
        widths = ",".join(map(str, sizes))
        command = [sys.executable, __file__, "--alone", task, "--sizes", widths]
        told[task] = json.loads(subprocess.check_output(command))
    size = 8 * sum((n + 1) * m for n, m in itertools.pairwise(sizes))
    lines = []
    for task, (seconds, values, peak) in told.items():
        beyond = f"{(peak - told[NATIVE][2]) / size:.2f}"
        goal = "" if task == NATIVE else "< 60 s, < 8"
        cells = duration(seconds), f"{values:,}", f"{peak / 1e6:,.0f} MB", beyond
        lines.append([task, *cells, goal])
    columns = ["", ">time", ">values", ">peak", ">beyond", ">goal"]
    note = (
        "Values: how often the loss was evaluated. Beyond: the peak beyond that of the "
        f"loss's own gradient, over the parameters' {size / 1e6:,.0f} MB in float64."
    )
    print(Table(f"An MLP of {size // 8:,} parameters", columns, lines, note))


def widths(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--slow", action="store_true", help="gradcheck's slow mode and check_grads too")
    add("--rounds", type=int, default=9, help="of the small one; 0 leaves it out")
    add("--sizes", default=LARGE, type=widths, help="of the large one: 2048,512,10")
    add("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.alone, options.sizes)))
        return
    import torch

    print(machine(torch.__version__), end="\n\n")
    if options.rounds:
        small(options.rounds, options.slow)
    large(options.sizes)


if __name__ == "__main__":
    main()
