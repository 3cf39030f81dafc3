"""Ports of linear layers, convolutions, embeddings; and what ports are made with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax
from torch import nn

from ports.case import Port, Problem, arrays_of, draw, labels, seeded


def ports(
    build: Callable[[str], Problem], **wrong: tuple[str, ...]
) -> tuple[Port, ...]:
    """The right port, and a wrong one per mistake: its kind, then where it is."""
    name = build.__name__
    right = Port(name, partial(build, ""))
    return right, *(
        Port(f"{name}-{mistake}", partial(build, mistake), kind, tuple(where))
        for mistake, (kind, *where) in wrong.items()
    )


def tensor(array: jax.Array) -> torch.Tensor:
    """A copy, as a dataloader gives it: class numbers are int64."""
    copy = torch.tensor(np.array(array))
    return copy if copy.is_floating_point() else copy.long()


def channels_first(x: jax.Array) -> torch.Tensor:
    return tensor(x).permute(0, 3, 1, 2).contiguous()


def torch_mse(module, x, y):
    return F.mse_loss(module(x), y)


def torch_cross_entropy(module, x, y):
    return F.cross_entropy(module(x), y)


def mse(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def linear(params: dict, prefix: str, x: jax.Array) -> jax.Array:
    """A linear layer of parameters that kept PyTorch's names."""
    return x @ params[f"{prefix}.weight"].T + params[f"{prefix}.bias"]


def mlp(mistake: str) -> Problem:
    """A list of dicts; weights are (in, out)."""
    module = seeded(
        1,
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
        ),
    )
    t = arrays_of(module)
    params = [{"w": t[f"{i}.weight"].T, "b": t[f"{i}.bias"]} for i in (0, 2, 4)]
    if mistake == "transposed":
        params[1]["w"] = t["2.weight"]
    if mistake == "entry":
        params[1]["w"] = params[1]["w"].at[3, 2].add(0.01)
    if mistake == "frozen":
        module[2].weight.requires_grad_(False)
    activation = jax.nn.relu if mistake == "relu" else jnp.tanh

    def loss(params, x, y):
        *hidden, last = params
        for layer in hidden:
            x = activation(x @ layer["w"] + layer["b"])
        error = (x @ last["w"] + last["b"] - y) ** 2
        if mistake == "sum":
            return error.sum()
        if mistake == "sum_of_outputs":
            return error.sum(-1).mean()
        return 0.5 * error.mean() if mistake == "half" else error.mean()

    return Problem(loss, params, (draw(1, 8, 5), draw(2, 8, 3)), module, torch_mse)


class Conv1d(nn.Module):
    def __init__(self, mistake: str):
        super().__init__()
        mode = "circular" if mistake == "circular" else "zeros"
        self.conv1 = nn.Conv1d(3, 6, 5, stride=2, padding=2, padding_mode=mode)
        self.conv2 = nn.Conv1d(6, 4, 3, dilation=2)
        self.trainable = mistake != "no_grad"

    def forward(self, x):
        with torch.set_grad_enabled(self.trainable):
            h = F.relu(self.conv1(x))
        return self.conv2(h).mean(-1)


class EquinoxConv1d(eqx.Module):
    conv1: eqx.nn.Conv1d
    conv2: eqx.nn.Conv1d

    def __init__(self, mistake: str):
        key1, key2 = jax.random.split(jax.random.key(0))
        padding = "SAME" if mistake == "same" else 2
        dilation = 1 if mistake == "dilation" else 2
        self.conv1 = eqx.nn.Conv1d(3, 6, 5, stride=2, padding=padding, key=key1)
        bias = mistake != "no_bias"
        self.conv2 = eqx.nn.Conv1d(6, 4, 3, dilation=dilation, use_bias=bias, key=key2)

    def __call__(self, x):
        return self.conv2(jax.nn.relu(self.conv1(x))).mean(-1)


def conv1d(mistake: str) -> Problem:
    """Equinox under vmap; a bias is (out, 1) there."""
    module = seeded(2, lambda: Conv1d(mistake))
    t = arrays_of(module)
    model = EquinoxConv1d(mistake)
    for name in ("conv1", "conv2"):
        weight, bias = t[f"{name}.weight"], t[f"{name}.bias"][:, None]
        if mistake == "flipped":
            weight = weight[..., ::-1]
        model = eqx.tree_at(lambda m: getattr(m, name).weight, model, weight)  # noqa: B023
        copied = mistake != "bias_not_copied" or name == "conv1"
        if getattr(model, name).bias is not None and copied:
            model = eqx.tree_at(lambda m: getattr(m, name).bias, model, bias)  # noqa: B023

    def loss(model, x, y):
        return mse(jax.vmap(model)(x), y)

    return Problem(loss, model, (draw(3, 7, 3, 12), draw(4, 7, 4)), module, torch_mse)


def conv2d(mistake: str) -> Problem:
    """NHWC and HWIO; what is flattened comes in another order than PyTorch's."""
    mode = "reflect" if mistake == "reflect" else "zeros"
    module = seeded(
        3,
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode=mode),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 3),
        ),
    )
    t = arrays_of(module)
    kernel = t["0.weight"].transpose(2, 3, 1, 0)
    if mistake == "height_and_width":
        kernel = kernel.swapaxes(0, 1)
    if mistake == "bgr":
        kernel = kernel[:, :, ::-1]
    head = t["3.weight"].reshape(3, 4, 3, 4).transpose(2, 3, 1, 0).reshape(48, 3)
    if mistake == "flatten":
        head = t["3.weight"].T
    params = {
        "conv": {"kernel": kernel, "bias": t["0.bias"]},
        "head": {"kernel": head, "bias": t["3.bias"]},
    }
    padding = "SAME" if mistake == "same" else ((1, 1), (1, 1))

    def loss(params, x, y):
        conv, head = params["conv"], params["head"]
        h = lax.conv_general_dilated(
            x,
            conv["kernel"],
            (2, 2),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = jax.nn.relu(h + conv["bias"]).reshape(len(x), -1)
        return cross_entropy(h @ head["kernel"] + head["bias"], y)

    x, y = draw(5, 5, 6, 8, 2), labels(6, 5, 3)
    options = {"torch_args": (channels_first(x), tensor(y))}
    return Problem(loss, params, (x, y), module, torch_cross_entropy, options)


class GroupedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.conv.bias)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.pool(self.conv(x).relu()).amax((2, 3)))


class NNXGroupedConv(nnx.Module):
    def __init__(self, mistake: str, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 8, (3, 3), padding=1, feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.count = mistake != "count_include_pad"
        self.padding = "SAME" if mistake == "same" else ((1, 1), (1, 1))
        self.shuffled = mistake == "input_channels"

    def __call__(self, x):
        if self.shuffled:  # (group, channel of it) taken for (channel, group)
            x = x.reshape(*x.shape[:-1], 2, 2).swapaxes(-1, -2).reshape(x.shape)
        h = nnx.relu(self.conv(x))
        h = nnx.avg_pool(
            h,
            (3, 3),
            strides=(2, 2),
            padding=self.padding,
            count_include_pad=self.count,
        )
        return self.head(h.max((1, 2)))


def grouped_conv2d(mistake: str) -> Problem:
    """Flax NNX, split into a graph and its state; all biases are zeros."""
    module = seeded(4, GroupedConv)
    t = arrays_of(module)
    model = NNXGroupedConv(mistake, nnx.Rngs(0))
    kernel = t["conv.weight"].transpose(2, 3, 1, 0)
    if mistake == "output_channels":
        kernel = kernel.reshape(3, 3, 2, 2, 4).swapaxes(-1, -2).reshape(kernel.shape)
    model.conv.kernel[...] = kernel
    model.head.kernel[...] = t["head.weight"].T
    if mistake == "frozen":
        module.conv.requires_grad_(False)
    graph, params = nnx.split(model)

    def loss(params, x, y):
        return mse(nnx.merge(graph, params)(x), y)

    x, y = draw(7, 5, 6, 7, 4), draw(8, 5, 3)
    options = {"torch_args": (channels_first(x), tensor(y))}
    return Problem(loss, params, (x, y), module, torch_mse, options)


def embedding(mistake: str) -> Problem:
    """A bag of words: what stands at `padding_idx` isn't trained, nor counted."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 4, padding_idx=0)
            self.head = nn.Linear(4, 3)
            if mistake == "frozen":
                self.embedding.weight.requires_grad_(False)

        def forward(self, ids):
            counts = (ids != 0).sum(1, keepdim=True)
            return self.head(self.embedding(ids).sum(1) / counts)

    module = seeded(10, Bag)
    params = arrays_of(module)
    if mistake == "row":
        table = params["embedding.weight"]
        params["embedding.weight"] = table.at[4].set(table[5])

    def loss(params, ids, y):
        table = params["embedding.weight"]
        if mistake != "padding_idx":
            table = table.at[0].set(0.0)
        h = table[ids]
        if mistake == "scaled":
            h = h * jnp.sqrt(4.0)
        counts = (ids != 0).sum(1, keepdims=True)
        bag = h.mean(1) if mistake == "padding_counted" else h.sum(1) / counts
        logits = linear(params, "head", bag)
        right = jnp.take_along_axis(logits, y[:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - right)

    ids = labels(17, (7, 5), 11).at[:, 0].set(3).at[:4, 3:].set(0)
    return Problem(loss, params, (ids, labels(18, 7, 3)), module, torch_cross_entropy)


class TiedLM(nn.Module):
    def __init__(self, mistake: str):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.hidden = nn.Linear(6, 6)
        self.detached = mistake == "detached"

    def forward(self, ids):
        h = torch.tanh(self.hidden(self.embed(ids) * 6**0.5))
        table = self.embed.weight
        return F.linear(h, table.detach() if self.detached else table)


def tied_embedding(mistake: str) -> Problem:
    """A bigram model; the table is used at both ends. Next tokens of 0 are ignored."""
    module = seeded(11, lambda: TiedLM(mistake))
    t = arrays_of(module)
    kernel = t["hidden.weight"] if mistake == "transposed" else t["hidden.weight"].T
    params = {
        "embed": t["embed.weight"],
        "hidden": {"kernel": kernel, "bias": t["hidden.bias"]},
    }

    def torch_loss(module, ids):
        logits = module(ids[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=0)

    def loss(params, ids):
        h = params["embed"][ids[:, :-1]]
        if mistake != "unscaled":
            h = h * jnp.sqrt(6.0)
        h = jnp.tanh(h @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        logits = h @ params["embed"].T
        logp = jax.nn.log_softmax(logits, axis=1 if mistake == "axis" else -1)
        y = ids[:, 1:]
        nll = -jnp.take_along_axis(logp, y[..., None], -1)[..., 0]
        if mistake == "ignored_counted":
            return nll.mean()
        total = jnp.where(y != 0, nll, 0.0).sum()
        return total / (y.size if mistake == "divided_by_all" else (y != 0).sum())

    ids = labels(19, (5, 8), 12).at[2:, 6:].set(0)
    return Problem(loss, params, (ids,), module, torch_loss)


def bilinear(mistake: str) -> Problem:
    """The weight as a matrix (in1 * in2, out)."""
    module = seeded(12, lambda: nn.Bilinear(5, 5, 3))
    t = arrays_of(module)
    matrix = t["weight"].reshape(3, 25).T
    if mistake == "transposed":
        matrix = t["weight"].transpose(2, 1, 0).reshape(25, 3)
    params = {"matrix": matrix, "bias": t["bias"]}
    if mistake == "no_bias":
        del params["bias"]
    if mistake == "frozen":
        module.bias.requires_grad_(False)

    def loss(params, a, b, y):
        if mistake == "inputs":
            a, b = b, a
        products = (a[:, :, None] * b[:, None, :]).reshape(len(a), 25)
        error = products @ params["matrix"] + params.get("bias", 0.0) - y
        return jnp.sum(error**2) / (len(a) if mistake == "divided_by_batch" else y.size)

    def torch_loss(module, a, b, y):
        return F.mse_loss(module(a, b), y)

    args = (draw(20, 8, 5), draw(21, 8, 5), draw(22, 8, 3))
    return Problem(loss, params, args, module, torch_loss)


PORTS: tuple[Port, ...] = (
    *ports(
        mlp,
        sum=("reduction",),
        sum_of_outputs=("reduction",),
        half=("factor",),
        transposed=("transposed", "2", "2.weight", "[1].w"),
        entry=("values", "2.weight", "[1].w"),
        frozen=("missing_gradient", "2.weight", "[1].w"),
        relu=("activation", "1"),
    ),
    *ports(
        conv1d,
        same=("padding", "conv1"),
        circular=("padding", "conv1"),
        dilation=("padding", "conv2"),
        flipped=("permuted|transposed", "conv1", "conv1.weight"),
        no_bias=("bias", "conv2", "conv2.bias"),
        bias_not_copied=("values", "conv2.bias"),
        no_grad=("missing_gradient", "conv1.weight", "conv1.bias"),
    ),
    *ports(
        conv2d,
        same=("padding", "0"),
        reflect=("padding", "0"),
        height_and_width=("transposed|permuted", "0", "0.weight", "conv.kernel"),
        bgr=("permuted", "0", "0.weight", "conv.kernel"),
        flatten=("permuted", "2", "3", "3.weight", "head.kernel"),
    ),
    *ports(
        grouped_conv2d,
        count_include_pad=("padding", "pool"),
        same=("padding", "pool"),
        input_channels=("permuted", "conv", "conv.weight", "conv.kernel.value"),
        output_channels=("permuted", "conv", "conv.weight", "conv.kernel.value"),
        frozen=("missing_gradient", "conv.weight", "conv.bias"),
    ),
    *ports(
        embedding,
        padding_idx=("missing_gradient", "embedding.weight"),
        frozen=("missing_gradient", "embedding.weight"),
        row=("values", "embedding.weight"),
        scaled=("factor", "embedding", "head"),
        padding_counted=("mask", "head"),
    ),
    *ports(
        tied_embedding,
        detached=("missing_gradient", "embed.weight", "embed"),
        transposed=("transposed", "hidden", "hidden.weight", "hidden.kernel"),
        unscaled=("factor", "embed", "hidden"),
        axis=("softmax_axis",),
        ignored_counted=("mask",),
        divided_by_all=("factor|reduction|mask",),
    ),
    *ports(
        bilinear,
        transposed=("transposed", "", "weight", "matrix"),
        inputs=("swapped|transposed", "", "weight", "matrix"),
        no_bias=("bias", "", "bias"),
        frozen=("missing_gradient", "bias"),
        divided_by_batch=("reduction",),
    ),
)
