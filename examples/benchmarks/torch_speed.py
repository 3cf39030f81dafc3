"""What `compare_with_torch` costs on GPT-2's shapes: 124 million parameters, at random.

    torch_speed.py                both ports, each task in a process of its own
    torch_speed.py --blocks 2     a smaller model

Matching: which JAX leaf is made of which PyTorch parameters. The passes are those that
the comparison has to run: forward and backward, in float32 and in float64, by `jax.jit`
with its compilation and by PyTorch.
"""

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from interleaved import duration, machine
from torch import nn

import jaxgrad
from jaxgrad.comparing.jax_side import JaxSide
from jaxgrad.comparing.matching import match
from jaxgrad.comparing.sides import TorchModel, in_double, natively
from jaxgrad.comparing.torch_side import kept, tensors_of
from jaxgrad.tables import Table


class Sizes(NamedTuple):
    """GPT-2's configuration, and how long the sequence is."""

    blocks: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = 50257
    sequence: int = 32


PORTS = ("blocks", "stacked")
"""JAX's leaves: a dict for each block, or all blocks stacked for a scan."""


# PyTorch's side


class _Attention(nn.Module):
    """Causal attention; queries, keys and values in one product."""

    def __init__(self, sizes):
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width)
        self.c_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in self.c_attn(x).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(-2, -3).flatten(-2))


class _Block(nn.Module):
    """Attention and a network of two layers, each beside a path that goes around."""

    def __init__(self, sizes):
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width)
        self.attn = _Attention(sizes)
        self.ln_2 = nn.LayerNorm(sizes.width)
        self.c_fc = nn.Linear(sizes.width, 4 * sizes.width)
        self.c_proj = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        h = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.c_proj(h)


class _GPT2(nn.Module):
    """The whole; the head's weight is the embedding's."""

    def __init__(self, sizes):
        super().__init__()
        self.wte = nn.Embedding(sizes.vocabulary, sizes.width)
        self.wpe = nn.Embedding(sizes.context, sizes.width)
        self.h = nn.ModuleList(_Block(sizes) for _ in range(sizes.blocks))
        self.ln_f = nn.LayerNorm(sizes.width)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[-1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def torch_loss(module, tokens):
    log_odds = module(tokens[:, :-1])
    return F.cross_entropy(log_odds.flatten(0, -2), tokens[:, 1:].flatten())


# JAX's side


def port(module, sizes, kind):
    """The parameters as JAX has them: kernels are (in, out)."""
    arrays = {name: p.detach().numpy() for name, p in module.named_parameters()}

    def norm(name):
        return {"scale": arrays[f"{name}.weight"], "shift": arrays[f"{name}.bias"]}

    def dense(name):
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def block(name):
        return {
            "norm1": norm(f"{name}.ln_1"),
            "qkv": dense(f"{name}.attn.c_attn"),
            "out": dense(f"{name}.attn.c_proj"),
            "norm2": norm(f"{name}.ln_2"),
            "up": dense(f"{name}.c_fc"),
            "down": dense(f"{name}.c_proj"),
        }

    blocks = [block(f"h.{i}") for i in range(sizes.blocks)]
    params = {
        "tokens": arrays["wte.weight"],
        "places": arrays["wpe.weight"],
        "blocks": blocks,
        "norm": norm("ln_f"),
    }
    if kind == "stacked":
        params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return jax.tree.map(jnp.array, params)


def new_loss(sizes, kind):
    """A new function, for which nothing is compiled yet."""

    def normed(p, x):
        x = x - jnp.mean(x, -1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
        return x / deviation * p["scale"] + p["shift"]

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def attention(p, x):
        shape = *x.shape[:2], sizes.heads, -1
        q, k, v = (
            part.reshape(shape).transpose(0, 2, 1, 3)
            for part in jnp.split(dense(p["qkv"], x), 3, axis=-1)
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), -1)
        return dense(p["out"], (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape))

    def block(x, p):
        x = x + attention(p, normed(p["norm1"], x))
        h = jax.nn.gelu(dense(p["up"], normed(p["norm2"], x)))
        return x + dense(p["down"], h), None

    def loss(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = params["tokens"][inputs] + params["places"][: inputs.shape[1]]
        if kind == "stacked":
            x, _ = jax.lax.scan(block, x, params["blocks"])
        else:
            for p in params["blocks"]:
                x, _ = block(x, p)
        log_odds = jax.nn.log_softmax(normed(params["norm"], x) @ params["tokens"].T)
        return -jnp.mean(jnp.take_along_axis(log_odds, targets[..., None], -1))

    return loss


# The tasks


class Problem(NamedTuple):
    """Both sides of a port."""

    loss: object
    params: object
    tokens: jax.Array
    module: nn.Module


def problem(sizes, kind):
    torch.manual_seed(0)
    module = _GPT2(sizes)
    params = port(module, sizes, kind)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, sizes.vocabulary, (1, sizes.sequence + 1))
    return Problem(new_loss(sizes, kind), params, jnp.asarray(tokens), module)


def timed(task):
    began = time.perf_counter()
    result = task()
    return time.perf_counter() - began, result


def matching(it):
    """Which leaf is which."""
    named = jax.tree_util.tree_leaves_with_path(it.params)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}
    parameters = {name: p.detach().numpy() for name, p in it.module.named_parameters()}
    seconds, matches = timed(lambda: match(leaves, parameters))
    assert not matches.unmatched_leaves
    assert not matches.unmatched_names
    assert not matches.differing
    return {"seconds": seconds}


def comparison(it):
    """All of it, as a user has it."""
    seconds, report = timed(
        lambda: jaxgrad.compare_with_torch(
            it.loss, it.params, it.tokens, module=it.module, torch_loss=torch_loss
        )
    )
    assert report.ok, str(report)
    wide = any(row.exact_error is not None for row in report.parameters)
    return {"seconds": seconds, "wide": wide}


def passes(it):
    """Forward and backward, each side by itself, in both precisions."""
    told = {}
    (tokens,) = tensors_of((it.tokens,))

    def backward():
        it.module.zero_grad()
        torch_loss(it.module, tokens).backward()

    def gradient(params):
        value_and_grad = jax.jit(jax.value_and_grad(it.loss))
        return jax.block_until_ready(value_and_grad(params, it.tokens))

    told["torch, float32"], _ = timed(backward)
    told["JAX, float32"], _ = timed(lambda: gradient(it.params))
    it.module.double()
    told["torch, float64"], _ = timed(backward)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), it.params)
        told["JAX, float64"], _ = timed(lambda: gradient(wide))
    return {"seconds": sum(told.values()), "parts": told}


def sides(it):
    """The same, as the comparison runs them: with all values on the way."""
    told = {}
    told["trace"], side = timed(
        lambda: JaxSide(it.loss, it.params, (it.tokens,), has_aux=False)
    )
    tensors = tensors_of((it.tokens,))
    model = TorchModel(it.module, torch_loss, tensors, frozenset())
    with kept(it.module):
        told["float32"], _ = timed(lambda: natively(model, side))

        def wide():
            with in_double(model, side):
                pass

        told["float64"], _ = timed(wide)
    return {"seconds": sum(told.values()), "parts": told}


TASKS = {task.__name__: task for task in (matching, passes, sides, comparison)}


def memory_now(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def alone(name, kind, sizes):
    """What a task takes in this process: seconds, and the peak of the memory beyond."""
    tiny = problem(Sizes(1, 1, 8, 8, 8, 4), kind)
    TASKS[name](tiny)  # loads the compiler
    it = problem(sizes, kind)
    jax.block_until_ready(it.params)
    resident = memory_now("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    told = TASKS[name](it)
    size = sum(math.prod(p.shape) for p in it.module.parameters())
    return {**told, "peak": memory_now("VmHWM") - resident, "bytes": 4 * size}


def elsewhere(name, kind, sizes):
    command = [sys.executable, __file__, "--alone", name, kind, *map(str, sizes)]
    return json.loads(subprocess.check_output(command))


def show(sizes, kind, told):
    size = told["matching"]["bytes"] // 4
    rows = []
    for name, of in told.items():
        goal = "< 30 s, < 3" if name == "matching" else ""
        cells = duration(of["seconds"]), f"{of['peak'] / of['bytes']:.2f}"
        rows.append([name, *cells, goal])
        for part, seconds in of.get("parts", {}).items():
            rows.append([f"  {part}", duration(seconds), "", ""])
    run = told["passes"]["parts"]
    if not told["comparison"]["wide"]:  # nothing called for float64
        run = {part: seconds for part, seconds in run.items() if "64" not in part}
    needed = sum(run.values())
    whole = told["comparison"]["seconds"]
    for name, of in (("sides", told["sides"]["seconds"]), ("plain passes", needed)):
        goal = "< 20 %" if name == "sides" else ""
        rows.append([f"beyond the {name}", f"{100 * (whole / of - 1):.0f} %", "", goal])
    title = (
        f"GPT-2: {sizes.blocks} blocks, {size:,} parameters, {sizes.sequence} tokens; "
        f"JAX's leaves: {kind}"
    )
    note = (
        "Memory: the peak beyond what the process had, over the parameters' bytes. "
        "Passes: forward and backward in float32 and float64, JAX's with compilation. "
        "Sides: the same with all values on the way, as the comparison runs them."
    )
    print(Table(title, ["", ">time", ">memory", ">goal"], rows, note))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--blocks", type=int, default=Sizes().blocks, help="of the model")
    add("--port", choices=PORTS, help="only this one")
    add("--alone", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        name, kind, *sizes = options.alone
        return print(json.dumps(alone(name, kind, Sizes(*map(int, sizes)))))
    sizes = Sizes(blocks=options.blocks)
    print(machine(importlib.metadata.version("torch")), end="\n\n")
    for kind in PORTS:
        if options.port in (None, kind):
            show(sizes, kind, {name: elsewhere(name, kind, sizes) for name in TASKS})


if __name__ == "__main__":
    main()
