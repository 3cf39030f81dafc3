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
    function(*operands, **options)
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

    class WrongMatmul(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight):
            context.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(context, cotangent):
            x, weight = context.saved_tensors
            wrong = x.T @ cotangent
            wrong[ENTRY] += wrong.square().mean().sqrt()
            return cotangent @ weight.T, wrong

    def tensor(x):
        return torch.tensor(np.asarray(x, int if x.dtype.kind == "i" else float))

    operands = problem(SMALL, SMALL_BATCH)
    *leaves, x, labels = map(tensor, jax.tree.leaves(operands))

    def gradcheck(wrong=False, **options):
        def twin(*leaves):
            out = x
            for number, (weight, bias) in enumerate(
                zip(leaves[::2], leaves[1::2], strict=True)
            ):
                out = out.relu() if number else out
                apply = WrongMatmul.apply if wrong and number == LAYER else torch.matmul
                out = apply(out, weight) + bias
            return torch.nn.functional.cross_entropy(out, labels)

        inputs = [leaf.requires_grad_() for leaf in leaves]
        return torch.autograd.gradcheck(twin, inputs, raise_exception=False, **options)

    def check_grads():
        loss, (params, *rest) = new_loss(), operands
        jax.test_util.check_grads(lambda p: loss(p, *rest), (params,), 1, ("rev",))

    base, ours = "gradcheck, fast mode", "check_gradient"
    broken = "check_gradient, one wrong entry, located"
    missed = gradcheck(wrong=True, fast_mode=True)
    fast = f"gradcheck, fast mode, one wrong entry, {'missed' if missed else 'noticed'}"
    contestants = {
        base: lambda: elapsed(gradcheck, fast_mode=True),
        fast: lambda: elapsed(gradcheck, wrong=True, fast_mode=True),
        ours: lambda: elapsed(check, operands),
        broken: lambda: elapsed(check, operands, wrong=True),
    }
    interleave(contestants, 1)  # meets what only the first call does
    times = interleave(contestants, rounds)
    if slow:
        times["gradcheck, slow mode, once"] = [elapsed(gradcheck)] * rounds
        times["check_grads, reverse mode, once"] = [elapsed(check_grads)] * rounds
    count = sum(leaf.numel() for leaf in leaves)
    title = f"An MLP of {count:,} parameters: each time a new loss, compile included"
    show(title, rows(times, base, {ours: "< 1", broken: "< 1"}), "gradcheck")


def alone(task, sizes):
    """What one task costs in this process, in which nothing else happens."""
    operands, values = problem(sizes, LARGE_BATCH), [1]

    def run():
        if task == "native":
            jax.block_until_ready(jax.jit(jax.value_and_grad(new_loss()))(*operands))
        else:
            values[0] = check(operands, wrong=task == "wrong")

    seconds = elapsed(run)
    # Not getrusage's ru_maxrss: a process's starts at the size of the one that began it.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return seconds, values[0], peak


def large(sizes):
    told = {}
    names = {
        "native": "jit(value_and_grad)",
        "right": "check_gradient",
        "wrong": "the same, an entry wrong",
    }
    widths = ",".join(map(str, sizes))
    for task in names:
        command = [sys.executable, __file__, "--alone", task, "--sizes", widths]
        told[task] = json.loads(subprocess.check_output(command))
    size = 8 * sum((n + 1) * m for n, m in itertools.pairwise(sizes))
    lines = [
        [
            names[task],
            duration(seconds),
            f"{values:,}",
            f"{peak / 1e6:,.0f} MB",
            f"{(peak - told['native'][2]) / size:.2f}",
            "" if task == "native" else "< 60 s, < 8",
        ]
        for task, (seconds, values, peak) in told.items()
    ]
    columns = ["", ">time", ">values", ">peak", ">beyond", ">goal"]
    note = (
        "Values: how often the loss was evaluated. Beyond: the peak beyond that of the "
        f"loss and its gradient, over the parameters' own {size / 1e6:,.0f} MB in float64."
    )
    print(Table(f"An MLP of {size // 8:,} parameters", columns, lines, note))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--slow", action="store_true", help="gradcheck's slow mode and check_grads too")
    add("--rounds", type=int, default=9, help="of the small one; 0 leaves it out")
    add("--sizes", default=LARGE, metavar="N,N,...", help="widths of the large one")
    add("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = options.sizes
    if isinstance(sizes, str):
        sizes = [int(n) for n in sizes.split(",") if n]
    if options.alone:
        print(json.dumps(alone(options.alone, sizes)))
        return
    import torch

    print(machine(torch.__version__), end="\n\n")
    if options.rounds:
        small(options.rounds, options.slow)
    if sizes:
        large(sizes)


if __name__ == "__main__":
    main()
