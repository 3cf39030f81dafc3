"""What jaxgrad costs beside JAX by hand, optax, NumPy and PyTorch: `--quick` to try."""

import argparse
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import interleave, machine, rows, show

import jaxgrad

try:
    import torch
except ImportError:
    torch = None

NEURON = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
X, Y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
RATE = 0.01


def plain_loss(params, x, y):
    """What a person would write without jaxgrad."""
    return jnp.mean((x @ params.weight.T + params.bias - y) ** 2)


def elapsed(function, repeats=1):
    """Seconds for one of `repeats` calls, until the last result is there."""
    began = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / repeats


def per_call(calls, rounds):
    loss = jaxgrad.linear_loss
    by_hand = jax.jit(jax.value_and_grad(loss))
    ours = jaxgrad.value_and_grad(loss)
    base = "jax.jit(jax.value_and_grad(loss))"
    kept = "jaxgrad.value_and_grad(loss), kept"
    contestants = {
        base: lambda: by_hand(NEURON, X, Y),
        kept: lambda: ours(NEURON, X, Y),
        "jaxgrad.value_and_grad(loss), each time": (
            lambda: jaxgrad.value_and_grad(loss)(NEURON, X, Y)
        ),
    }
    for call in contestants.values():
        call()  # compiles
    timed = {
        name: lambda call=call: elapsed(call, calls)
        for name, call in contestants.items()
    }
    return rows(interleave(timed, rounds), base, {kept: "≤ 1.05"})


def first_call(rounds):
    def with_new_loss(transform):
        def loss(params, x, y):
            return jaxgrad.linear_loss(params, x, y)

        return elapsed(lambda: transform(loss)(NEURON, X, Y))

    base, ours = "jax.jit(jax.value_and_grad(loss))", "jaxgrad.value_and_grad(loss)"
    timed = {
        base: lambda: with_new_loss(lambda loss: jax.jit(jax.value_and_grad(loss))),
        ours: lambda: with_new_loss(jaxgrad.value_and_grad),
    }
    return rows(interleave(timed, rounds), base, {ours: "≤ 1.1"})


def import_time(rounds):
    def imported(module):
        code = (
            f"import time; began = time.perf_counter(); import {module}; "
            "print(time.perf_counter() - began)"
        )
        run = [sys.executable, "-c", code]
        return float(subprocess.run(run, capture_output=True, check=True).stdout)

    timed = {
        f"import {module}": lambda module=module: imported(module)
        for module in ("jax", "jaxgrad")
    }
    return rows(interleave(timed, rounds), "import jax", {"import jaxgrad": "≤ 1.15"})


def training_step(long, short, rounds):
    """Seconds per step: of `long` runs on the device, and `short` loops in Python."""
    optimizer = optax.sgd(RATE)

    def updated(params, x, y):
        gradient = jax.grad(jaxgrad.linear_loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)

    def updated_by_optax(params, state, x, y):
        gradient = jax.grad(jaxgrad.linear_loss)(params, x, y)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    by_scan = jax.jit(
        lambda params, x, y: jax.lax.scan(
            lambda params, _: (updated(params, x, y), None), params, length=long
        )[0]
    )
    by_hand, by_optax = jax.jit(updated), jax.jit(updated_by_optax)

    def trained(record_every):
        run = jaxgrad.train(
            jaxgrad.linear_loss,
            NEURON,
            X,
            Y,
            steps=long,
            learning_rate=RATE,
            record_every=record_every,
            progress=False,
        )
        return run.params

    def loop():
        params = NEURON
        for _ in range(short):
            params = by_hand(params, X, Y)
        return params

    def optax_loop():
        params, state = NEURON, optimizer.init(NEURON)
        for _ in range(short):
            params, state = by_optax(params, state, X, Y)
        return params

    base, ours = "a bare lax.scan", "jaxgrad.train, one record"
    runs = {
        base: (lambda: by_scan(NEURON, X, Y), long),
        ours: (lambda: trained(long), long),
        "jaxgrad.train, all recorded": (lambda: trained(1), long),
        "a jitted JAX step, in Python": (loop, short),
        "a jitted optax step, in Python": (optax_loop, short),
    }
    missing = []
    eager, compiled = "PyTorch eager, in Python", "a torch.compile step, in Python"
    if torch is None:
        missing = [[name, "not installed", "", ""] for name in (eager, compiled)]
    else:
        runs[eager] = (eager_torch_loop(short), short)
        try:
            with warnings.catch_warnings(action="ignore"):  # PyTorch's own, compiling
                run = compiled_torch_loop(short)
                run()
            runs[compiled] = (run, short)
        except Exception as error:  # no C++ compiler, or a Python it doesn't know yet
            missing.append([compiled, f"none: {type(error).__name__}", "", ""])
    for run, _ in runs.values():  # compiles; and each must reach the target
        weight, bias = map(np.asarray, run())
        np.testing.assert_allclose(X @ weight.T + bias, Y, rtol=1e-3)
    timed = {
        name: lambda run=run, steps=steps: elapsed(run) / steps
        for name, (run, steps) in runs.items()
    }
    return [*rows(interleave(timed, rounds), base, {ours: "≤ 2"}), *missing]


def eager_torch_loop(steps):
    layer = torch.nn.Linear(3, 1)
    start = dict(zip(("weight", "bias"), to_torch(*NEURON), strict=True))
    x, y = to_torch(X, Y)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)

    def loop():
        layer.load_state_dict(start)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(layer(x), y).backward()
            optimizer.step()
        return [p.detach() for p in layer.parameters()]

    return loop


def compiled_torch_loop(steps):
    """The whole step as one compiled function: the fastest of PyTorch's forms tried."""
    x, y = to_torch(X, Y)

    def loss(weight, bias):
        prediction = torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.mse_loss(prediction, y)

    @torch.compile(fullgraph=True)
    def step(params):
        gradient = torch.func.grad(loss, (0, 1))(*params)
        return [p - RATE * g for p, g in zip(params, gradient, strict=True)]

    def loop():
        params = to_torch(*NEURON)
        for _ in range(steps):
            params = step(params)
        return params

    return loop


def to_torch(*arrays):
    return [torch.from_numpy(np.array(array)) for array in arrays]


def large_gradient(examples, features, rounds):
    """Seconds for one full-batch gradient; every contestant reads the same memory."""
    rng = np.random.default_rng(0)
    x, y = aligned((examples, features)), aligned((examples, 1))
    true = rng.standard_normal((1, features), dtype=np.float32)
    rng.standard_normal(out=x, dtype=np.float32)
    y[:] = x @ true.T + rng.standard_normal((examples, 1), dtype=np.float32)
    weight, bias = np.zeros((1, features), np.float32), np.zeros(1, np.float32)
    params = jaxgrad.LinearParams(jnp.asarray(weight), jnp.asarray(bias))
    jax_x, jax_y = jax.device_put((x, y), may_alias=True)
    if jax.default_backend() == "cpu":
        assert jax_x.unsafe_buffer_pointer() == x.ctypes.data

    def by_numpy():
        error = (x @ weight.T + bias - y) * np.float32(2 / examples)
        return error.T @ x, error.sum(axis=0)

    plain = jax.jit(jax.grad(plain_loss))
    checked = jaxgrad.grad(jaxgrad.linear_loss)
    total = jax.jit(jnp.sum)
    base = "jax.jit(jax.grad(loss)), plain"
    ours = "jaxgrad.grad(jaxgrad.linear_loss)"
    contestants = {
        base: lambda: plain(params, jax_x, jax_y),
        ours: lambda: checked(params, jax_x, jax_y),
        "NumPy by hand": by_numpy,
    }
    missing = []
    if torch is None:
        missing.append(["PyTorch eager", "not installed", "", ""])
    else:
        contestants["PyTorch eager"] = torch_gradient(x, y, weight, bias)
    for contestant in contestants.values():
        gradient = contestant()  # compiles; and it must be the same gradient
        for a, b in zip(gradient, by_numpy(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(true).max())
    contestants["x.sum(), one read: the floor"] = lambda: total(jax_x)

    def timed(run):
        run()  # meets what the one before left behind, so that the next doesn't
        return elapsed(run)

    contestants = {
        name: lambda run=run: timed(run) for name, run in contestants.items()
    }
    return [*rows(interleave(contestants, rounds), base, {ours: "≤ 1"}), *missing]


def aligned(shape):
    """An empty float32 array that JAX uses as it is, without a copy elsewhere.

    Where a large array lies, and in pages of which size, can double the time to read
    it: that would be measured in place of the gradient.
    """
    size = int(np.prod(shape))
    room = np.empty(size + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16  # to a multiple of 64 bytes
    return room[start : start + size].reshape(shape)


def torch_gradient(x, y, weight, bias):
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    weight, bias = (leaf.requires_grad_() for leaf in to_torch(weight, bias))

    def gradient():
        weight.grad = bias.grad = None
        prediction = torch.nn.functional.linear(x, weight, bias)
        torch.nn.functional.mse_loss(prediction, y).backward()
        return weight.grad.numpy(), bias.grad.numpy()

    return gradient


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, for a look")
    quick = parser.parse_args().quick

    print(machine(torch.__version__ if torch else "not installed"), end="\n\n")
    show(
        "One call at the lesson's size",
        per_call(*((100, 3) if quick else (2000, 101))),
        "by hand",
    )
    show(
        "The first call: trace and compile",
        first_call(3 if quick else 101),
        "by hand",
    )
    show("Importing", import_time(1 if quick else 21), "jax")
    show(
        "A training step at the lesson's size: dispatch, not arithmetic",
        training_step(*((1000, 20, 1) if quick else (5_000_000, 2000, 15))),
        "a scan",
    )
    examples, features = 10_000 if quick else 1_000_000, 128
    show(
        f"One gradient of {examples:,} x {features} float32 examples",
        large_gradient(examples, features, 3 if quick else 31),
        "plain",
    )


if __name__ == "__main__":
    main()
