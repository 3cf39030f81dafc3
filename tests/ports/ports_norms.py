"""Ports of norms: of layers, of groups, of batches in both modes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import lax
from torch import nn

from ports.case import Port, Problem, arrays_of, as_jax, draw, labels, seeded
from ports.ports_layers import (
    channels_first,
    cross_entropy,
    linear,
    mse,
    ports,
    tensor,
    torch_cross_entropy,
    torch_mse,
)


def spread(norm: nn.Module) -> nn.Module:
    """Gives a norm the weights that it has after training: not ones and zeros."""
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape))
        norm.bias.copy_(0.2 * torch.randn(norm.bias.shape))
    return norm


class LayerNormMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(5, 7)
        self.norm = spread(nn.LayerNorm(7))
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x):
        return self.fc2(F.gelu(self.norm(self.fc1(x))))


class LayerNormParams(NamedTuple):
    w1: jax.Array
    b1: jax.Array
    gamma: jax.Array
    beta: jax.Array
    w2: jax.Array
    b2: jax.Array


def layernorm(mistake: str) -> Problem:
    """A NamedTuple; the variance in one pass."""
    module = seeded(5, LayerNormMLP)
    w1, b1, gamma, beta, w2, b2 = arrays_of(module).values()
    if mistake == "swapped":
        gamma, beta = beta, gamma
    params = LayerNormParams(w1.T, b1, gamma, beta, w2.T, b2)
    activation = {
        "silu": jax.nn.silu,
        "tanh": jax.nn.gelu,
    }.get(mistake, partial(jax.nn.gelu, approximate=False))

    def norm(p, h):
        mean = h.mean(-1, keepdims=True)
        variance = (h**2).mean(-1, keepdims=True) - mean**2
        if mistake == "unbiased":
            variance = variance * (7 / 6)
        eps = 1e-6 if mistake == "epsilon" else 1e-5
        if mistake == "epsilon_outside":
            return (h - mean) / (jnp.sqrt(variance) + eps) * p.gamma + p.beta
        return (h - mean) * lax.rsqrt(variance + eps) * p.gamma + p.beta

    def loss(p, x, y):
        h = activation(norm(p, x @ p.w1 + p.b1))
        return mse(h @ p.w2 + p.b2, y)

    return Problem(loss, params, (draw(9, 9, 5), draw(10, 9, 3)), module, torch_mse)


class FreshBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + torch.tanh(layer(norm(x)))
        return self.layers[-1](x)


class EquinoxBlocks(eqx.Module):
    layers: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]
    frozen: bool = eqx.field(static=True)

    def __call__(self, x):
        layers = self.layers
        if self.frozen:
            layers = [lax.stop_gradient(layers[0]), *layers[1:]]
        for layer, norm in zip(layers, self.norms, strict=False):
            x = x + jnp.tanh(layer(norm(x)))
        return layers[-1](x)


def layernorm_fresh(mistake: str) -> Problem:
    """Norms that are alike, and the first layer frozen on both sides; Equinox."""
    module = seeded(6, FreshBlocks)
    module.layers[0].requires_grad_(False)
    order = (1, 0, 2) if mistake == "swapped" else (0, 1, 2)
    layers = []
    for i in order:
        layer = eqx.nn.Linear(6, 6, key=jax.random.key(0))
        weight, bias = map(as_jax, (module.layers[i].weight, module.layers[i].bias))
        if mistake == "transposed" and i == 1:
            weight = weight.T
        layers.append(eqx.tree_at(lambda m: (m.weight, m.bias), layer, (weight, bias)))
    eps = 1e-3 if mistake == "epsilon" else 1e-5
    norms = [eqx.nn.LayerNorm(6, eps=eps) for _ in range(2)]
    model = EquinoxBlocks(layers, norms, frozen=mistake != "thawed")

    def loss(model, x, y):
        return mse(jax.vmap(model)(x), y)

    return Problem(loss, model, (draw(11, 10, 6), draw(12, 10, 6)), module, torch_mse)


def groupnorm(mistake: str) -> Problem:
    """A 1x1 convolution as a product; channels last."""
    module = seeded(
        7,
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1),
            spread(nn.GroupNorm(2, 6)),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
        ),
    )
    t = arrays_of(module)
    norm_pair = (t["1.weight"], t["1.bias"])
    params = (
        (t["0.weight"][:, :, 0, 0].T, t["0.bias"]),
        norm_pair[::-1] if mistake == "swapped" else norm_pair,
        (t["5.weight"].T, t["5.bias"]),
    )

    def norm(h):
        n, height, width, _ = h.shape
        shape, axes = (n, height, width, 2, 3), (1, 2, 4)
        if mistake == "interleaved":
            shape, axes = (n, height, width, 3, 2), (1, 2, 3)
        g = h.reshape(shape)
        mean = g.mean(axes, keepdims=True)
        variance = g.var(axes, keepdims=True, ddof=int(mistake == "unbiased"))
        if mistake == "stopped":
            mean, variance = lax.stop_gradient((mean, variance))
        eps = 1e-6 if mistake == "epsilon" else 1e-5
        return ((g - mean) / jnp.sqrt(variance + eps)).reshape(h.shape)

    def loss(params, x, y):
        (w, b), (scale, bias), (w_out, b_out) = params
        h = jax.nn.silu(norm(x @ w + b) * scale + bias)
        return mse(h.mean((1, 2)) @ w_out + b_out, y)

    x, y = draw(13, 8, 4, 5, 3), draw(14, 8, 2)
    options = {"torch_args": (channels_first(x), tensor(y))}
    return Problem(loss, params, (x, y), module, torch_mse, options)


def batchnorm_eval(mistake: str) -> Problem:
    """PyTorch's running statistics are data in JAX."""

    def trained():
        norm = spread(nn.BatchNorm1d(6))
        module = nn.Sequential(nn.Linear(5, 6), norm, nn.ReLU(), nn.Linear(6, 3))
        for _ in range(20):
            module(0.5 + 2 * torch.randn(32, 5))
        return module.train(mistake == "torch_in_train_mode")

    module = seeded(8, trained)
    params = arrays_of(module)
    stats = {
        "mean": as_jax(module[1].running_mean),
        "var": as_jax(module[1].running_var),
    }
    if mistake == "statistics_not_copied":
        stats = {"mean": jnp.zeros(6), "var": jnp.ones(6)}
    if mistake == "swapped":
        params["1.weight"], params["1.bias"] = params["1.bias"], params["1.weight"]

    def loss(params, stats, x, y):
        h = linear(params, "0", x)
        mean, var = stats["mean"], stats["var"]
        if mistake == "batch_statistics":
            mean, var = h.mean(0), h.var(0)
        eps = 1e-3 if mistake == "epsilon" else 1e-5
        h = (h - mean) / jnp.sqrt(var + eps) * params["1.weight"] + params["1.bias"]
        return cross_entropy(linear(params, "3", jax.nn.relu(h)), y)

    x, y = draw(15, 11, 5), labels(16, 11, 3)
    options = {"torch_args": (tensor(x), tensor(y))}
    return Problem(loss, params, (stats, x, y), module, torch_cross_entropy, options)


def batchnorm_train(mistake: str) -> Problem:
    """The convolution's bias has no effect: the batch's mean takes it away."""

    def fresh():
        norm = spread(nn.BatchNorm2d(4))
        conv = nn.Conv2d(2, 4, 3)
        return nn.Sequential(
            conv, norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        )

    module = seeded(9, fresh)
    t = arrays_of(module)
    params = {
        "conv": {"w": t["0.weight"], "b": t["0.bias"][:, None, None]},
        "norm": {"scale": t["1.weight"], "offset": t["1.bias"]},
        "head": {"w": t["5.weight"], "b": t["5.bias"]},
    }
    running_mean, running_var = jnp.zeros(4), jnp.ones(4)

    def norm(p, h):
        mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3))
        if mistake == "unbiased":
            var = h.var((0, 2, 3), ddof=1)
        if mistake == "stopped":
            mean, var = lax.stop_gradient((mean, var))
        if mistake == "running_statistics":
            mean, var = running_mean, running_var
        eps = 1e-3 if mistake == "epsilon" else 1e-5
        scale = p["scale"] * lax.rsqrt(var + eps)
        shift = p["offset"] - mean * scale
        return h * scale[:, None, None] + shift[:, None, None]

    def loss(params, x, y):
        conv, head = params["conv"], params["head"]
        h = lax.conv(x, conv["w"], (1, 1), "VALID") + conv["b"]
        h = jax.nn.relu(norm(params["norm"], h))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return mse(h.reshape(len(x), -1) @ head["w"].T + head["b"], y)

    x, y = draw(23, 7, 2, 6, 7), draw(24, 7, 3)
    return Problem(loss, params, (x, y), module, torch_mse)


PORTS: tuple[Port, ...] = (
    *ports(
        layernorm,
        epsilon=("epsilon", "norm"),
        epsilon_outside=("epsilon", "norm"),
        unbiased=("variance", "norm"),
        swapped=("swapped", "norm", "norm.weight", "norm.bias", "gamma", "beta"),
        tanh=("gelu", "fc2"),
        silu=("activation", "fc2"),
    ),
    *ports(
        layernorm_fresh,
        epsilon=("epsilon", "norms.0"),
        swapped=("swapped", "layers.0", "layers.0.weight", "layers.1.weight"),
        transposed=("transposed", "layers.1", "layers.1.weight", "layers[1].weight"),
        thawed=("missing_gradient", "layers.0.weight", "layers.0.bias"),
    ),
    *ports(
        groupnorm,
        epsilon=("epsilon", "1"),
        unbiased=("variance", "1"),
        interleaved=("permuted", "1"),
        swapped=("swapped", "1", "1.weight", "1.bias"),
        stopped=("missing_gradient", "0.weight", "0.bias"),
    ),
    *ports(
        batchnorm_eval,
        torch_in_train_mode=("train_mode", "1"),
        batch_statistics=("train_mode", "1"),
        statistics_not_copied=("values|train_mode", "1"),
        epsilon=("epsilon", "1"),
        swapped=("swapped", "1", "1.weight", "1.bias"),
    ),
    *ports(
        batchnorm_train,
        running_statistics=("train_mode", "1"),
        unbiased=("variance", "1"),
        epsilon=("epsilon", "1"),
        stopped=("missing_gradient", "0.weight"),
    ),
)
