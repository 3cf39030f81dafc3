"""LSTMs and GRUs, ported: plain JAX, Equinox, Flax NNX."""

from __future__ import annotations

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


class Tagger(tnn.Module):
    """A recurrent network, and a linear layer on its last output."""

    def __init__(self, rnn: tnn.Module, classes: int):
        super().__init__()
        self.rnn = rnn
        self.head = tnn.Linear(rnn.hidden_size, classes)

    def forward(self, x):
        hs, _ = self.rnn(x)
        return self.head(hs[:, -1])


def squared(module, x, y):
    return F.mse_loss(module(x), y)


# An LSTM of two layers, in plain JAX


def rnn_params(arrays, layers=2):
    """PyTorch's parameters as people lay them out: kernels are (in, out)."""
    return {
        "layers": [
            {
                "ih": arrays[f"rnn.weight_ih_l{k}"].T,
                "hh": arrays[f"rnn.weight_hh_l{k}"].T,
                "b_ih": arrays[f"rnn.bias_ih_l{k}"],
                "b_hh": arrays[f"rnn.bias_hh_l{k}"],
            }
            for k in range(layers)
        ],
        "head": {"w": arrays["head.weight"].T, "b": arrays["head.bias"]},
    }


def lstm(mistake=""):
    module = seeded(0, lambda: Tagger(tnn.LSTM(5, 8, 2, batch_first=True), 3))
    params = rnn_params(arrays_of(module))
    if mistake == "ih_and_hh":
        last = params["layers"][1]
        last["ih"], last["hh"] = last["hh"], last["ih"]
    if mistake == "frozen":
        module.rnn.weight_hh_l0.requires_grad_(False)

    def step(layer, carry, x):
        h, c = carry
        gates = x @ layer["ih"] + layer["b_ih"] + h @ layer["hh"]
        if mistake != "one_bias":
            gates = gates + layer["b_hh"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        if mistake == "gates":
            g, o = o, g
        gate = nn.hard_sigmoid if mistake == "hard_sigmoid" else nn.sigmoid
        c = gate(f) * c + gate(i) * jnp.tanh(g)
        h = gate(o) * jnp.tanh(c)
        return (h, c), h

    def loss(params, x, y):
        hs = x.swapaxes(0, 1)
        for layer in params["layers"]:
            start = jnp.zeros((len(x), layer["hh"].shape[0]))
            _, hs = lax.scan(partial(step, layer), (start, start), hs)
        out = hs[-1] @ params["head"]["w"] + params["head"]["b"]
        error = jnp.sum((out - y) ** 2, axis=-1)
        return error.mean() if mistake == "sum_outputs" else error.mean() / y.shape[-1]

    args = (draw(1, 6, 7, 5), draw(2, 6, 3))
    return Problem(loss, params, args, module, squared)


# One layer, as Equinox's cell: its one bias is the sum of PyTorch's two


class Cell(eqx.Module):
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear
    truncated: bool = False

    def __call__(self, xs):
        def step(carry, x):
            if self.truncated:
                carry = lax.stop_gradient(carry)
            return self.cell(x, carry), None

        start = (jnp.zeros(8), jnp.zeros(8))
        (h, _), _ = lax.scan(step, start, xs)
        return self.head(h)


def lstm_equinox_params(arrays):
    keys = jax.random.split(jax.random.key(0))
    model = Cell(eqx.nn.LSTMCell(5, 8, key=keys[0]), eqx.nn.Linear(8, 3, key=keys[1]))
    return eqx.tree_at(
        lambda m: [
            *(m.cell.weight_ih, m.cell.weight_hh, m.cell.bias),
            *(m.head.weight, m.head.bias),
        ],
        model,
        [
            arrays["rnn.weight_ih_l0"],
            arrays["rnn.weight_hh_l0"],
            arrays["rnn.bias_ih_l0"] + arrays["rnn.bias_hh_l0"],
            arrays["head.weight"],
            arrays["head.bias"],
        ],
    )


def lstm_equinox(mistake=""):
    module = seeded(3, lambda: Tagger(tnn.LSTM(5, 8, batch_first=True), 3))
    arrays = arrays_of(module)
    if mistake == "one_bias":
        arrays["rnn.bias_hh_l0"] = jnp.zeros(32)
    if mistake == "gates":
        for name in list(arrays):
            if name.startswith("rnn"):  # i, f, o, g
                i, f, g, o = jnp.split(arrays[name], 4)
                arrays[name] = jnp.concatenate([i, f, o, g])
    model = lstm_equinox_params(arrays)
    if mistake == "truncated":
        model = eqx.tree_at(lambda m: m.truncated, model, True)

    def loss(model, x, y):
        error = (jax.vmap(model)(x) - y) ** 2
        return error.sum() if mistake == "sum" else error.mean()

    args = (draw(4, 6, 7, 5), draw(5, 6, 3))
    return Problem(loss, model, args, module, squared)


# The same, as Flax NNX's cell: a kernel per gate


class Reader(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.LSTMCell(5, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, xs):
        carry = (jnp.zeros((len(xs), 8)), jnp.zeros((len(xs), 8)))
        for t in range(xs.shape[1]):
            carry, h = self.cell(carry, xs[:, t])
        return self.head(h)


def reader(arrays):
    model = Reader(nnx.Rngs(0))
    cell = model.cell
    inputs = jnp.split(arrays["rnn.weight_ih_l0"], 4)
    hiddens = jnp.split(arrays["rnn.weight_hh_l0"], 4)
    biases = jnp.split(arrays["rnn.bias_ih_l0"] + arrays["rnn.bias_hh_l0"], 4)
    for gate, kernel in zip((cell.ii, cell.if_, cell.ig, cell.io), inputs, strict=True):
        gate.kernel[...] = kernel.T
    gates = (cell.hi, cell.hf, cell.hg, cell.ho)
    for gate, kernel, bias in zip(gates, hiddens, biases, strict=True):
        gate.kernel[...] = kernel.T
        gate.bias[...] = bias
    model.head.kernel[...] = arrays["head.weight"].T
    model.head.bias[...] = arrays["head.bias"]
    return model


def lstm_nnx(mistake=""):
    module = seeded(6, lambda: Tagger(tnn.LSTM(5, 8, batch_first=True), 3))
    model = reader(arrays_of(module))
    cell = model.cell
    if mistake == "transposed":
        for gate in (cell.hi, cell.hf, cell.hg, cell.ho):
            gate.kernel[...] = gate.kernel[...].T
    if mistake == "gates":
        cell.ig, cell.io = cell.io, cell.ig
        cell.hg, cell.ho = cell.ho, cell.hg
    graph, params = nnx.split(model)

    def loss(params, x, y):
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    def torch_loss(module, x, y):
        with torch.set_grad_enabled(mistake != "no_grad"):
            hs, _ = module.rnn(x)
        return F.mse_loss(module.head(hs[:, -1]), y)

    args = (draw(7, 6, 4, 5), draw(8, 6, 3))
    return Problem(loss, params, args, module, torch_loss)


# A GRU of two layers, in plain JAX


def gru(mistake=""):
    module = seeded(9, lambda: Tagger(tnn.GRU(8, 8, 2, batch_first=True), 4))
    params = rnn_params(arrays_of(module))
    if mistake == "layers":
        params["layers"].reverse()

    def step(layer, h, x):
        r, z, n = jnp.split(x @ layer["ih"] + layer["b_ih"], 3, axis=-1)
        if mistake == "bias_outside_reset":
            hr, hz, hn = jnp.split(h @ layer["hh"], 3, axis=-1)
            br, bz, bn = jnp.split(layer["b_hh"], 3)
            hr, hz, n = hr + br, hz + bz, n + bn
        else:
            hr, hz, hn = jnp.split(h @ layer["hh"] + layer["b_hh"], 3, axis=-1)
        if mistake == "gates":  # Keras has z, r, n
            r, z, hr, hz = z, r, hz, hr
        r, z = nn.sigmoid(r + hr), nn.sigmoid(z + hz)
        h = (1 - z) * jnp.tanh(n + r * hn) + z * h
        return h, h

    def loss(params, x, y):
        hs = x.swapaxes(0, 1)
        for layer in params["layers"]:
            start = jnp.zeros((len(x), 8))
            _, hs = lax.scan(partial(step, layer), start, hs)
        logits = hs[-1] @ params["head"]["w"] + params["head"]["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean()

    def torch_loss(module, x, y):
        reduction = "sum" if mistake == "sum" else "mean"
        return F.cross_entropy(module(x), y, reduction=reduction)

    args = (draw(10, 5, 7, 8), labels(11, 5, 4))
    return Problem(loss, params, args, module, torch_loss)


# One layer, sequence first in PyTorch, as Equinox's cell: its second bias is n's alone


def gru_equinox_params(arrays):
    keys = jax.random.split(jax.random.key(1))
    cell = eqx.nn.GRUCell(8, 8, key=keys[0])
    head = eqx.nn.Linear(8, 2, key=keys[1])
    ih, hh = arrays["rnn.bias_ih_l0"], arrays["rnn.bias_hh_l0"]
    cell = eqx.tree_at(
        lambda c: (c.weight_ih, c.weight_hh, c.bias, c.bias_n),
        cell,
        (
            arrays["rnn.weight_ih_l0"],
            arrays["rnn.weight_hh_l0"],
            ih + hh.at[16:].set(0),
            hh[16:],
        ),
    )
    head = eqx.tree_at(
        lambda m: (m.weight, m.bias), head, (arrays["head.weight"], arrays["head.bias"])
    )
    return {"cell": cell, "head": head}


def gru_equinox(mistake=""):
    module = seeded(12, lambda: Tagger(tnn.GRU(8, 8), 2))
    params = gru_equinox_params(arrays_of(module))
    cell = params["cell"]
    if mistake == "bias_n":
        params["cell"] = eqx.tree_at(
            lambda c: (c.bias, c.bias_n),
            cell,
            (cell.bias.at[16:].add(cell.bias_n), jnp.zeros(8)),
        )
    if mistake == "ih_and_hh":
        params["cell"] = eqx.tree_at(
            lambda c: (c.weight_ih, c.weight_hh), cell, (cell.weight_hh, cell.weight_ih)
        )
    if mistake == "entry":
        changed = cell.weight_hh.at[5, 2].add(0.25)
        params["cell"] = eqx.tree_at(lambda c: c.weight_hh, cell, changed)
    if mistake == "frozen":
        module.rnn.bias_hh_l0.requires_grad_(False)

    def tag(params, xs):
        def step(h, x):
            h = params["cell"](x, h)
            return h, params["head"](h)

        return lax.scan(step, jnp.zeros(8), xs)[1]

    def loss(params, x, y):
        return jnp.mean((jax.vmap(partial(tag, params))(x) - y) ** 2)

    def torch_loss(module, x, y):
        hs, _ = module.rnn(x)
        return ((module.head(hs) - y) ** 2).mean()

    args = (draw(13, 5, 7, 8), draw(14, 5, 7, 2))
    first = [torch.tensor(np.asarray(a)).transpose(0, 1).contiguous() for a in args]
    return Problem(loss, params, args, module, torch_loss, {"torch_args": tuple(first)})


def _rnn(*parts: str) -> tuple[str, ...]:
    return ("rnn", *(f"rnn.{part}" for part in parts))


_ALL = _rnn("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

PORTS: tuple[Port, ...] = (
    Port("lstm", lstm),
    Port("lstm-gates_ifog", partial(lstm, "gates"), "permuted|swapped", ("rnn",)),
    Port(
        "lstm-ih_and_hh_swapped",
        partial(lstm, "ih_and_hh"),
        "swapped",
        _rnn("weight_ih_l1", "weight_hh_l1"),
    ),
    Port(
        "lstm-one_bias",
        partial(lstm, "one_bias"),
        "bias",
        _rnn("bias_hh_l0", "bias_hh_l1"),
    ),
    Port("lstm-hard_sigmoid", partial(lstm, "hard_sigmoid"), "activation", ("rnn",)),
    Port("lstm-sum_outputs", partial(lstm, "sum_outputs"), "reduction"),
    Port(
        "lstm-frozen",
        partial(lstm, "frozen"),
        "missing_gradient",
        ("rnn.weight_hh_l0", "layers[0].hh"),
    ),
    Port("lstm_equinox", lstm_equinox),
    Port(
        "lstm_equinox-one_bias",
        partial(lstm_equinox, "one_bias"),
        "bias|values",
        (*_rnn("bias_ih_l0", "bias_hh_l0"), "cell.bias"),
    ),
    Port("lstm_equinox-gates_ifog", partial(lstm_equinox, "gates"), "permuted", _ALL),
    Port(
        "lstm_equinox-truncated",
        partial(lstm_equinox, "truncated"),
        "missing_gradient",
        (*_ALL, "cell.weight_ih", "cell.weight_hh", "cell.bias"),
    ),
    Port("lstm_equinox-sum", partial(lstm_equinox, "sum"), "reduction"),
    Port("lstm_nnx", lstm_nnx),
    Port(
        "lstm_nnx-transposed",
        partial(lstm_nnx, "transposed"),
        "transposed",
        (*_rnn("weight_hh_l0"), "cell.hi.kernel.value", "cell.hf.kernel.value"),
    ),
    Port(
        "lstm_nnx-gates_ifog", partial(lstm_nnx, "gates"), "swapped|permuted", ("rnn",)
    ),
    Port(
        "lstm_nnx-no_grad",
        partial(lstm_nnx, "no_grad"),
        "missing_gradient",
        (*_ALL, "cell.ii.kernel.value", "cell.hi.kernel.value", "cell.hi.bias.value"),
    ),
    Port("gru", gru),
    Port(
        "gru-bias_outside_reset",
        partial(gru, "bias_outside_reset"),
        "bias|unknown",
        _rnn("bias_hh_l0"),
    ),
    Port("gru-gates_zrn", partial(gru, "gates"), "permuted|swapped", ("rnn",)),
    Port(
        "gru-layers_swapped",
        partial(gru, "layers"),
        "swapped|permuted",
        (*_ALL, "layers[0].ih", "layers[1].ih"),
    ),
    Port("gru-sum", partial(gru, "sum"), "reduction"),
    Port("gru_equinox", gru_equinox),
    Port(
        "gru_equinox-bias_n_outside",
        partial(gru_equinox, "bias_n"),
        "bias|values",
        (*_rnn("bias_ih_l0", "bias_hh_l0"), "cell.bias_n", "cell.bias"),
    ),
    Port(
        "gru_equinox-ih_and_hh_swapped",
        partial(gru_equinox, "ih_and_hh"),
        "swapped",
        (*_rnn("weight_ih_l0", "weight_hh_l0"), "cell.weight_ih", "cell.weight_hh"),
    ),
    Port(
        "gru_equinox-one_entry",
        partial(gru_equinox, "entry"),
        "values",
        ("rnn.weight_hh_l0", "cell.weight_hh"),
    ),
    Port(
        "gru_equinox-frozen",
        partial(gru_equinox, "frozen"),
        "missing_gradient",
        ("rnn.bias_hh_l0", "cell.bias", "cell.bias_n"),
    ),
)
