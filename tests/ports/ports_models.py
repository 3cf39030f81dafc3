"""Small GPTs, a tied autoencoder, and weights in bfloat16, ported to plain JAX."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F
from jax import lax, nn
from torch import nn as tnn

from ports.case import Port, Problem, arrays_of, draw, labels, seeded

# A small GPT, its projections fused, its head tied


class Block(tnn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = tnn.LayerNorm(12), tnn.LayerNorm(12)
        self.c_attn, self.c_proj = tnn.Linear(12, 36), tnn.Linear(12, 12)
        self.c_fc, self.c_out = tnn.Linear(12, 48), tnn.Linear(48, 12)

    def forward(self, x):
        q, k, v = (
            a.unflatten(2, (2, 6)).transpose(1, 2)
            for a in self.c_attn(self.ln_1(x)).chunk(3, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(tnn.Module):
    def __init__(self, tied):
        super().__init__()
        self.wte, self.wpe = tnn.Embedding(17, 12), tnn.Embedding(9, 12)
        self.h = tnn.ModuleList([Block(), Block()])
        self.ln_f = tnn.LayerNorm(12)
        self.lm_head = tnn.Linear(12, 17, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def next_token(module, tokens):
    logits = module(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gpt_params(arrays):
    """A flat dict under PyTorch's names, as checkpoints have it; kernels (in, out)."""
    kernels = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "c_out.weight")
    return {
        name: array.T if name.endswith(kernels) else array
        for name, array in arrays.items()
    }


def layer_norm(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def gpt(mistake=""):
    module = seeded(0, lambda: GPT(tied=True))

    def of(params, name, x):
        if ".ln_" in name or name == "ln_f":
            return layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"])
        return x @ params[f"{name}.weight"] + params[f"{name}.bias"]

    def block(params, name, x):
        batch, time, width = x.shape
        qkv = of(params, f"{name}.c_attn", of(params, f"{name}.ln_1", x))
        q, k, v = qkv.reshape(batch, time, 3, 2, 6).transpose(2, 0, 1, 3, 4)
        if mistake == "kqv":
            q, k = k, q
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + of(params, f"{name}.c_proj", y.reshape(batch, time, width))
        h = of(params, f"{name}.c_fc", of(params, f"{name}.ln_2", x))
        h = nn.gelu(h, approximate=mistake != "gelu_exact")
        return x + of(params, f"{name}.c_out", h)

    def loss(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        table, time = params["wte.weight"], inputs.shape[1]
        first = 1 if mistake == "positions" else 0
        x = table[inputs] + params["wpe.weight"][first : first + time]
        for name in ("h.0", "h.1"):
            x = block(params, name, x)
        head = lax.stop_gradient(table) if mistake == "head_stopped" else table
        logits = of(params, "ln_f", x) @ head.T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if mistake == "token_sum":
            return losses.sum(axis=1).mean()
        return losses.mean()

    params = gpt_params(arrays_of(module))
    return Problem(loss, params, (labels(1, (4, 7), 17),), module, next_token)


# The same, untied, q, k and v apart and in heads, the blocks stacked for a scan


class Layer(NamedTuple):
    norms: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    qkv_bias: jax.Array
    out: jax.Array
    out_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    down: jax.Array
    down_bias: jax.Array


class Weights(NamedTuple):
    tokens: jax.Array
    positions: jax.Array
    layers: Layer
    norm: jax.Array
    head: jax.Array


def gpt_split_params(arrays):
    def layer(name):
        def get(part):
            return arrays[f"h.{name}.{part}"]

        norms = [get("ln_1.weight"), get("ln_1.bias")]
        norms += [get("ln_2.weight"), get("ln_2.bias")]
        q, k, v = get("c_attn.weight").T.reshape(12, 3, 2, 6).swapaxes(0, 1)
        return Layer(
            *(jnp.stack(norms), q, k, v, get("c_attn.bias").reshape(3, 2, 6)),
            *(get("c_proj.weight").T.reshape(2, 6, 12), get("c_proj.bias")),
            *(get("c_fc.weight").T, get("c_fc.bias")),
            *(get("c_out.weight").T, get("c_out.bias")),
        )

    return Weights(
        arrays["wte.weight"],
        arrays["wpe.weight"],
        jax.tree.map(lambda *ws: jnp.stack(ws), layer(0), layer(1)),
        jnp.stack([arrays["ln_f.weight"], arrays["ln_f.bias"]]),
        arrays["lm_head.weight"].T,
    )


def gpt_split(mistake=""):
    module = seeded(2, lambda: GPT(tied=False))
    params = gpt_split_params(arrays_of(module))
    if mistake == "head_not_copied":
        params = params._replace(head=draw(3, 12, 17, scale=0.2))
    if mistake == "transposed":
        out = params.layers.out.reshape(2, 12, 12).swapaxes(1, 2).reshape(2, 2, 6, 12)
        params = params._replace(layers=params.layers._replace(out=out))

    def block(x, p):
        h = layer_norm(x, *p.norms[:2])
        q, k, v = (
            jnp.einsum("bte,ehd->bthd", h, w) + b
            for w, b in zip((p.q, p.k, p.v), p.qkv_bias, strict=True)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        if mistake != "scale":
            scores = scores / q.shape[-1] ** 0.5
        if mistake != "mask":
            causal = jnp.tril(jnp.ones(scores.shape[2:], bool))
            scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        x = x + jnp.einsum("bthd,hde->bte", y, p.out) + p.out_bias
        h = nn.gelu(layer_norm(x, *p.norms[2:]) @ p.up + p.up_bias)
        return x + h @ p.down + p.down_bias, None

    def loss(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = params.tokens[inputs] + params.positions[: inputs.shape[1]]
        x, _ = lax.scan(block, x, params.layers)
        log_p = nn.log_softmax(layer_norm(x, *params.norm) @ params.head)
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()

    return Problem(loss, params, (labels(4, (4, 7), 17),), module, next_token)


# An autoencoder whose decoder is the encoder's transpose


class Tied(tnn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = tnn.Linear(11, 8)
        self.bias = tnn.Parameter(torch.zeros(11))

    def forward(self, x):
        h = F.silu(self.encoder(x))
        return F.linear(h, self.encoder.weight.t(), self.bias)


def tied_params(arrays):
    return {
        "w": arrays["encoder.weight"].T,
        "b": arrays["encoder.bias"],
        "c": arrays["bias"],
    }


def tied(mistake=""):
    module = seeded(5, Tied)
    params = tied_params(arrays_of(module))

    def loss(params, x):
        h = x @ params["w"] + params["b"]
        h = nn.elu(h) if mistake == "elu" else nn.silu(h)
        w = lax.stop_gradient(params["w"]) if mistake == "decoder" else params["w"]
        error = h @ w.T + params["c"] - x
        if mistake == "half":
            return jnp.mean(0.5 * error**2)
        return jnp.sum(error**2) / x.size

    def torch_loss(module, x):
        return F.mse_loss(module(x), x)

    return Problem(loss, params, (draw(6, 6, 11),), module, torch_loss)


# Weights in bfloat16 on both sides, or on one


def mlp_params(arrays, dtype=None):
    return [
        {
            "w": jnp.asarray(arrays[f"{k}.weight"].T, dtype),
            "b": jnp.asarray(arrays[f"{k}.bias"], dtype),
        }
        for k in (0, 2, 4)
    ]


def low(mistake="", ours=jnp.bfloat16, theirs=torch.bfloat16):
    def build():
        layers = [tnn.Linear(12, 12), tnn.GELU(), tnn.Linear(12, 12), tnn.GELU()]
        return tnn.Sequential(*layers, tnn.Linear(12, 3)).to(theirs)

    module = seeded(7, build)
    params = mlp_params(arrays_of(module), ours)
    if mistake == "layers":
        params[0], params[1] = params[1], params[0]
    if mistake == "transposed":
        params[1]["w"] = params[1]["w"].T
    if mistake == "frozen":
        module[0].weight.requires_grad_(False)
    activation = nn.relu if mistake == "relu" else partial(nn.gelu, approximate=False)

    def loss(params, x, y):
        h = x.astype(params[0]["w"].dtype)
        *hidden, last = params
        for layer in hidden:
            h = activation(h @ layer["w"] + layer["b"])
        out = (h @ last["w"] + last["b"]).astype(jnp.float32)
        error = jnp.sum((out - y) ** 2)
        return error if mistake == "sum" else error / y.size

    def torch_loss(module, x, y):
        out = module(x.to(module[0].weight.dtype))
        return F.mse_loss(out.float(), y)

    args = (draw(8, 7, 12, scale=2.0), draw(9, 7, 3))
    return Problem(loss, params, args, module, torch_loss)


float32_copy = partial(low, ours=jnp.float32)
bf16_copy = partial(low, theirs=torch.float32)

PORTS: tuple[Port, ...] = (
    Port("gpt", gpt),
    Port(
        "gpt-gelu_exact",
        partial(gpt, "gelu_exact"),
        "gelu",
        ("h.0.c_out", "h.0"),
    ),
    Port(
        "gpt-k_before_q",
        partial(gpt, "kqv"),
        "swapped|permuted",
        ("h.0.c_proj", "h.0", "h.0.c_attn.weight"),
    ),
    Port(
        "gpt-positions_off_by_one",
        partial(gpt, "positions"),
        "permuted|unknown",
        ("wpe", "wpe.weight", "h.0.ln_1"),
    ),
    Port(
        "gpt-head_stopped",
        partial(gpt, "head_stopped"),
        "missing_gradient",
        ("wte.weight", "['wte.weight']"),
    ),
    Port("gpt-token_sum", partial(gpt, "token_sum"), "reduction"),
    Port("gpt_split", gpt_split),
    Port(
        "gpt_split-no_scale",
        partial(gpt_split, "scale"),
        "factor",
        ("h.0.c_proj", "h.0"),
    ),
    Port(
        "gpt_split-no_mask", partial(gpt_split, "mask"), "mask", ("h.0.c_proj", "h.0")
    ),
    Port(
        "gpt_split-transposed",
        partial(gpt_split, "transposed"),
        "transposed",
        ("h.0.c_proj", "h.0.c_proj.weight", "layers.out"),
    ),
    Port(
        "gpt_split-head_not_copied",
        partial(gpt_split, "head_not_copied"),
        "values",
        ("lm_head.weight", "head"),
    ),
    Port("tied", tied),
    Port("tied-elu_for_silu", partial(tied, "elu"), "activation"),
    Port(
        "tied-decoder_stopped",
        partial(tied, "decoder"),
        "missing_gradient",
        ("encoder.weight", "w"),
    ),
    Port("tied-half", partial(tied, "half"), "factor"),
    Port("bf16", low),
    Port("bf16-relu_for_gelu", partial(low, "relu"), "activation", ("1",)),
    Port("bf16-sum", partial(low, "sum"), "reduction"),
    Port(
        "bf16-layers_swapped",
        partial(low, "layers"),
        "swapped",
        ("0", "0.weight", "2.weight", "[0].w", "[1].w"),
    ),
    Port("bf16_as_float32", float32_copy),
    Port(
        "bf16_as_float32-transposed",
        partial(float32_copy, "transposed"),
        "transposed",
        ("2", "2.weight", "[1].w"),
    ),
    Port(
        "bf16_as_float32-frozen",
        partial(float32_copy, "frozen"),
        "missing_gradient",
        ("0.weight", "[0].w"),
    ),
    Port(
        "bf16_as_float32-relu_for_gelu",
        partial(float32_copy, "relu"),
        "activation",
        ("1",),
    ),
    Port("float32_as_bf16", bf16_copy),
    Port("float32_as_bf16-sum", partial(bf16_copy, "sum"), "reduction"),
    Port(
        "float32_as_bf16-layers_swapped",
        partial(bf16_copy, "layers"),
        "swapped",
        ("0", "0.weight", "2.weight", "[0].w", "[1].w"),
    ),
    Port(
        "float32_as_bf16-relu_for_gelu",
        partial(bf16_copy, "relu"),
        "activation",
        ("1",),
    ),
)
