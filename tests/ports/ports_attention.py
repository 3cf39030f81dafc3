"""Attention and Transformer encoders, ported: plain JAX, Equinox, Flax NNX."""

from __future__ import annotations

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax, nn
from torch import nn as tnn

from ports.case import Port, Problem, arrays_of, draw, labels, seeded


def tensor(array):
    return torch.tensor(np.asarray(array))


# Self-attention: nn.MultiheadAttention against plain JAX, Equinox, Flax NNX


class SelfAttention(tnn.Module):
    """Causal, unless told otherwise; the biases aren't the zeros that PyTorch draws."""

    def __init__(self, width=12, heads=3, bias=0.0, dropout=0.0):
        super().__init__()
        self.attn = tnn.MultiheadAttention(width, heads, dropout, batch_first=True)
        if bias:
            tnn.init.normal_(self.attn.in_proj_bias, std=bias)
            tnn.init.normal_(self.attn.out_proj.bias, std=bias)

    def forward(self, x, causal=True):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out, _ = self.attn(
            x, x, x, attn_mask=mask if causal else None, need_weights=False
        )
        return x + out


def attended(module, x, y):
    return F.mse_loss(module(x), y)


def attention_params(arrays):
    """Kernels are (in, out), and q, k and v apart. The bias of k has no gradient."""
    kernels = jnp.split(arrays["attn.in_proj_weight"].T, 3, axis=1)
    biases = jnp.split(arrays["attn.in_proj_bias"], 3)
    return {
        **{
            name: {"w": w, "b": b}
            for name, w, b in zip("qkv", kernels, biases, strict=True)
        },
        "out": {
            "w": arrays["attn.out_proj.weight"].T,
            "b": arrays["attn.out_proj.bias"],
        },
    }


def dense(layer, x):
    return x @ layer["w"] + layer["b"]


def attention(mistake=""):
    module = seeded(0, lambda: SelfAttention(bias=0.3))
    params = attention_params(arrays_of(module))
    if mistake == "transposed":
        params["out"]["w"] = params["out"]["w"].T

    def loss(params, x, y):
        batch, time, width = x.shape
        q, k, v = (
            dense(params[name], x).reshape(batch, time, 3, 4).swapaxes(1, 2)
            for name in "qkv"
        )
        if mistake == "keys_stopped":
            k = lax.stop_gradient(k)
        scale = width if mistake == "scale" else q.shape[-1]
        scores = q @ k.swapaxes(2, 3) / jnp.sqrt(scale)
        if mistake != "mask":
            scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -1e9)
        weights = nn.softmax(scores, axis=2 if mistake == "softmax_axis" else 3)
        out = (weights @ v).swapaxes(1, 2).reshape(batch, time, width)
        return jnp.mean((x + dense(params["out"], out) - y) ** 2)

    args = (draw(1, 5, 6, 12), draw(2, 5, 6, 12))
    return Problem(loss, params, args, module, attended)


def attention_equinox_params(arrays):
    names = ("query", "key", "value", "output")
    with_biases = {f"use_{name}_bias": True for name in names}
    model = eqx.nn.MultiheadAttention(3, 12, **with_biases, key=jax.random.key(0))
    projections = [f"{name}_proj" for name in names]
    weights = [
        *jnp.split(arrays["attn.in_proj_weight"], 3),
        arrays["attn.out_proj.weight"],
    ]
    biases = [*jnp.split(arrays["attn.in_proj_bias"], 3), arrays["attn.out_proj.bias"]]
    return eqx.tree_at(
        lambda m: [
            *(getattr(m, name).weight for name in projections),
            *(getattr(m, name).bias for name in projections),
        ],
        model,
        weights + biases,
    )


def attention_equinox(mistake=""):
    dropout = 0.2 if mistake == "dropout" else 0.0
    module = seeded(3, lambda: SelfAttention(dropout=dropout))
    model = attention_equinox_params(arrays_of(module))
    if mistake == "q_and_k":
        model = eqx.tree_at(
            lambda m: (m.query_proj, m.key_proj),
            model,
            (model.key_proj, model.query_proj),
        )

    def loss(model, x, y):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        out = x + jax.vmap(lambda xs: model(xs, xs, xs, mask))(x)
        error = (out - y) ** 2
        return error.sum((1, 2)).mean() if mistake == "batch_mean" else error.mean()

    args = (draw(4, 5, 6, 12), draw(5, 5, 6, 12))
    return Problem(loss, model, args, module, attended)


def attention_nnx_model(arrays, use_bias=True):
    """The kernels are (in, heads, size), and (heads, size, out)."""
    model = nnx.MultiHeadAttention(
        3, 12, use_bias=use_bias, decode=False, rngs=nnx.Rngs(0)
    )
    weights = jnp.split(arrays["attn.in_proj_weight"], 3)
    projections = (model.query, model.key, model.value)
    for layer, weight in zip(projections, weights, strict=True):
        layer.kernel[...] = weight.T.reshape(12, 3, 4)
    model.out.kernel[...] = arrays["attn.out_proj.weight"].T.reshape(3, 4, 12)
    if use_bias:
        biases = jnp.split(arrays["attn.in_proj_bias"], 3)
        for layer, bias in zip(projections, biases, strict=True):
            layer.bias[...] = bias.reshape(3, 4)
        model.out.bias[...] = arrays["attn.out_proj.bias"]
    return model


def attention_nnx(mistake=""):
    module = seeded(6, lambda: SelfAttention(bias=0.3))
    model = attention_nnx_model(arrays_of(module), mistake != "no_bias")
    if mistake == "heads":  # taken for (in, size, heads)
        for layer in (model.query, model.key, model.value):
            kernel = layer.kernel[...].reshape(12, 4, 3)
            layer.kernel[...] = kernel.swapaxes(1, 2)
    if mistake == "entry":
        model.value.kernel[...] = model.value.kernel[...].at[3, 1, 2].set(0.0)
    if mistake == "frozen":
        module.attn.in_proj_weight.requires_grad_(False)
    graph, params = nnx.split(model)

    def loss(params, x, y):
        out = nnx.merge(graph, params)(x)
        return jnp.mean((x + out - y) ** 2)

    def torch_loss(module, x, y):
        return F.mse_loss(module(x, causal=False), y)

    args = (draw(7, 5, 6, 12), draw(8, 5, 6, 12))
    return Problem(loss, params, args, module, torch_loss)


# nn.TransformerEncoder: fresh, so that its layers are equal copies


class Classifier(tnn.Module):
    def __init__(self, layer, count=2):
        super().__init__()
        self.encoder = tnn.TransformerEncoder(layer, count, enable_nested_tensor=False)
        self.head = tnn.Linear(12, 4)

    def forward(self, x, padding=None):
        h = self.encoder(x, src_key_padding_mask=padding)
        return self.head(h.mean(1))


def layer_params(arrays, name):
    """A layer of the encoder, with the kernels (in, out), and q, k, v in one."""

    def linear(part):
        return {"w": arrays[f"{part}.weight"].T, "b": arrays[f"{part}.bias"]}

    return {
        "qkv": {
            "w": arrays[f"{name}.self_attn.in_proj_weight"].T,
            "b": arrays[f"{name}.self_attn.in_proj_bias"],
        },
        "out": linear(f"{name}.self_attn.out_proj"),
        "up": linear(f"{name}.linear1"),
        "down": linear(f"{name}.linear2"),
        **{
            norm: {
                "scale": arrays[f"{name}.{norm}.weight"],
                "shift": arrays[f"{name}.{norm}.bias"],
            }
            for norm in ("norm1", "norm2")
        },
    }


def encoder_params(arrays):
    return {
        "layers": [layer_params(arrays, f"encoder.layers.{k}") for k in range(2)],
        "head": {"w": arrays["head.weight"].T, "b": arrays["head.bias"]},
    }


def layer_norm(norm, x, eps=1e-5, ddof=0):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True, ddof=ddof)
    return (x - mean) / jnp.sqrt(var + eps) * norm["scale"] + norm["shift"]


def self_attention(layer, x, hidden=None):
    """Three heads; `hidden` says which keys are padding."""
    q, k, v = jnp.split(dense(layer["qkv"], x), 3, axis=-1)
    q, k, v = (a.reshape(*a.shape[:2], 3, 4) for a in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(4)
    if hidden is not None:
        scores = jnp.where(hidden[:, None, None, :], -jnp.inf, scores)
    out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
    return dense(layer["out"], out.reshape(x.shape))


def encoder(mistake=""):
    def build():
        layer = tnn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        return Classifier(layer).train(mistake == "train_mode")

    module = seeded(9, build)
    params = encoder_params(arrays_of(module))

    norm = partial(
        layer_norm,
        eps=1e-6 if mistake == "eps" else 1e-5,
        ddof=1 if mistake == "ddof" else 0,
    )
    activation = nn.gelu if mistake == "gelu_for_relu" else nn.relu

    def block(layer, x):
        if mistake == "norm_first":
            x = x + self_attention(layer, norm(layer["norm1"], x))
            h = activation(dense(layer["up"], norm(layer["norm2"], x)))
            return x + dense(layer["down"], h)
        x = norm(layer["norm1"], x + self_attention(layer, x))
        h = activation(dense(layer["up"], x))
        return norm(layer["norm2"], x + dense(layer["down"], h))

    def loss(params, x, y):
        for layer in params["layers"]:
            x = block(layer, x)
        logits = dense(params["head"], x.mean(axis=1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def torch_loss(module, x, y):
        h = module.encoder(x).mean(1)
        return F.cross_entropy(module.head(h.detach() if mistake == "probe" else h), y)

    args = (draw(10, 5, 6, 12), labels(11, 5, 4))
    return Problem(loss, params, args, module, torch_loss)


# The same, stacked for a scan: unlike layers, the norms first, and padding masked


def stacked_params(arrays):
    layers = [layer_params(arrays, f"encoder.layers.{k}") for k in range(2)]
    head = {"w": arrays["head.weight"].T, "b": arrays["head.bias"]}
    return {"layers": jax.tree.map(lambda *ws: jnp.stack(ws), *layers), "head": head}


def stacked(mistake=""):
    def build():
        layer = tnn.TransformerEncoderLayer(
            12, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True
        )
        module = Classifier(layer)
        for p in module.encoder.parameters():
            tnn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.3)
        return module

    module = seeded(12, build)
    params = stacked_params(arrays_of(module))
    if mistake == "frozen":
        module.encoder.layers[0].requires_grad_(False)

    def block(hidden, x, layer):
        x = x + self_attention(layer, layer_norm(layer["norm1"], x), hidden)
        h = dense(layer["up"], layer_norm(layer["norm2"], x))
        h = nn.gelu(h, approximate=mistake == "tanh")
        return x + dense(layer["down"], h), None

    def loss(params, x, hidden, y):
        if mistake == "mask":
            hidden = jnp.zeros_like(hidden)
        step = jax.checkpoint(partial(block, hidden))
        x, _ = lax.scan(step, x, params["layers"], reverse=mistake == "order")
        out = dense(params["head"], x.mean(axis=1))
        return jnp.mean((out - y) ** 2)

    def torch_loss(module, x, hidden, y):
        reduction = "sum" if mistake == "sum" else "mean"
        return F.mse_loss(module(x, hidden), y, reduction=reduction)

    hidden = np.arange(7) >= np.array([[7], [5], [3], [7], [4]])
    args = (draw(13, 5, 7, 12), jnp.asarray(hidden), draw(14, 5, 4))
    options = {"torch_args": tuple(tensor(a) for a in args)}
    return Problem(loss, params, args, module, torch_loss, options)


_ATTN = ("attn", "attn.in_proj_weight", "attn.in_proj_bias")
_FIRST = "encoder.layers.0"

PORTS: tuple[Port, ...] = (
    Port("attention", attention),
    Port("attention-scale", partial(attention, "scale"), "factor", ("attn",)),
    Port("attention-no_mask", partial(attention, "mask"), "mask", ("attn",)),
    Port(
        "attention-softmax_axis",
        partial(attention, "softmax_axis"),
        "softmax_axis",
        ("attn",),
    ),
    Port(
        "attention-transposed",
        partial(attention, "transposed"),
        "transposed",
        ("attn", "attn.out_proj", "attn.out_proj.weight", "out.w"),
    ),
    Port(
        "attention-keys_stopped",
        partial(attention, "keys_stopped"),
        "missing_gradient",
        (*_ATTN[1:], "k.w"),
    ),
    Port("attention_equinox", attention_equinox),
    Port(
        "attention_equinox-q_and_k_swapped",
        partial(attention_equinox, "q_and_k"),
        "swapped|permuted",
        (*_ATTN, "query_proj.weight", "key_proj.weight"),
    ),
    Port(
        "attention_equinox-dropout",
        partial(attention_equinox, "dropout"),
        "train_mode",
        ("attn",),
    ),
    Port(
        "attention_equinox-batch_mean",
        partial(attention_equinox, "batch_mean"),
        "reduction",
    ),
    Port("attention_nnx", attention_nnx),
    Port(
        "attention_nnx-heads",
        partial(attention_nnx, "heads"),
        "permuted",
        (*_ATTN, "query.kernel.value", "key.kernel.value", "value.kernel.value"),
    ),
    Port(
        "attention_nnx-one_entry",
        partial(attention_nnx, "entry"),
        "values",
        ("attn.in_proj_weight", "value.kernel.value"),
    ),
    Port(
        "attention_nnx-no_bias",
        partial(attention_nnx, "no_bias"),
        "bias",
        ("attn", "attn.in_proj_bias"),
    ),
    Port(
        "attention_nnx-frozen",
        partial(attention_nnx, "frozen"),
        "missing_gradient",
        (*_ATTN[1:], "query.kernel.value", "key.kernel.value", "value.kernel.value"),
    ),
    Port("encoder", encoder),
    Port(
        "encoder-gelu_for_relu",
        partial(encoder, "gelu_for_relu"),
        "activation",
        (f"{_FIRST}.dropout", f"{_FIRST}.linear2", _FIRST),
    ),
    Port(
        "encoder-train_mode",
        partial(encoder, "train_mode"),
        "train_mode",
        (f"{_FIRST}.self_attn", f"{_FIRST}.dropout1"),
    ),
    Port("encoder-eps", partial(encoder, "eps"), "epsilon", (f"{_FIRST}.norm1",)),
    Port("encoder-ddof", partial(encoder, "ddof"), "variance", (f"{_FIRST}.norm1",)),
    Port(
        "encoder-norm_first",
        partial(encoder, "norm_first"),
        "unknown",
        (f"{_FIRST}.self_attn", _FIRST),
    ),
    Port(
        "encoder-detached",
        partial(encoder, "probe"),
        "missing_gradient",
        (f"{_FIRST}.linear1.weight", "layers[0].up.w"),
    ),
    Port("stacked", stacked),
    Port(
        "stacked-gelu_tanh",
        partial(stacked, "tanh"),
        "gelu",
        (f"{_FIRST}.dropout", f"{_FIRST}.linear2", _FIRST),
    ),
    Port(
        "stacked-layers_reversed",
        partial(stacked, "order"),
        "swapped|permuted",
        (f"{_FIRST}.norm1", f"{_FIRST}.self_attn", _FIRST),
    ),
    Port(
        "stacked-no_mask",
        partial(stacked, "mask"),
        "mask",
        (f"{_FIRST}.self_attn", _FIRST),
    ),
    Port("stacked-sum", partial(stacked, "sum"), "reduction"),
    Port(
        "stacked-frozen",
        partial(stacked, "frozen"),
        "missing_gradient",
        (f"{_FIRST}.linear1.weight", "layers.up.w"),
    ),
)
