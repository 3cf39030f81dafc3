"""Ports of losses: small models, and what is made of their outputs."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from jax import lax
from torch import nn

from ports.case import Port, Problem, arrays_of, as_jax, draw, labels, seeded
from ports.ports_layers import linear, mse, ports, tensor, torch_mse


def label_smoothing(mistake: str) -> Problem:
    """Smoothed labels, with optax; parameters keep PyTorch's names."""

    def make():
        layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)]
        if mistake == "softmax_in_the_model":
            layers.append(nn.Softmax(-1))
        return nn.Sequential(*layers)

    module = seeded(21, make)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def torch_loss(module, x, y):
        return criterion(module(x), y)

    def loss(params, x, y):
        logits = linear(params, "2", jax.nn.relu(linear(params, "0", x)))
        targets = jax.nn.one_hot(y, 4)
        if mistake == "others_only":  # the true class keeps 0.9 and gets no share
            targets = jnp.where(targets == 1, 0.9, 0.1 / 3)
        elif mistake != "unsmoothed":
            alpha = 0.2 if mistake == "other_smoothing" else 0.1
            targets = optax.smooth_labels(targets, alpha)
        if mistake == "axis":
            return -(targets * jax.nn.log_softmax(logits, 0)).sum(-1).mean()
        losses = optax.softmax_cross_entropy(logits, targets)
        return losses.sum() if mistake == "sum" else losses.mean()

    args = (draw(31, 9, 5), labels(32, 9, 4))
    return Problem(loss, arrays_of(module), args, module, torch_loss)


def bce_with_logits(mistake: str) -> Problem:
    """Several labels at once, the rare ones weighted; Flax NNX."""
    module = seeded(
        22, lambda: nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3))
    )
    t = arrays_of(module)
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        trunk=nnx.Linear(6, 8, rngs=rngs), head=nnx.Linear(8, 3, rngs=rngs)
    )
    for name, digit in (("trunk", "0"), ("head", "2")):
        model[name].kernel[...] = t[f"{digit}.weight"].T
        model[name].bias[...] = t[f"{digit}.bias"]
    graph, params = nnx.split(model, nnx.Param)
    weight = 3.0

    def torch_loss(module, x, y):
        if mistake == "no_grad":
            with torch.no_grad():
                h = module[:2](x)
            z = module[2](h)
        else:
            z = module(x)
        return F.binary_cross_entropy_with_logits(
            z, y, pos_weight=torch.tensor([weight] * 3)
        )

    def loss(params, x, y):
        model = nnx.merge(graph, params)
        slope = 0.01 if mistake == "slope" else 0.1
        z = model.head(nnx.leaky_relu(model.trunk(x), slope))
        # The losses, negated: log-likelihoods.
        logp = weight * y * nnx.log_sigmoid(z) + (1 - y) * nnx.log_sigmoid(-z)
        if mistake == "likelihood":
            return logp.mean()
        if mistake == "sum_of_labels":
            return -logp.sum(-1).mean()
        if mistake == "bits":
            return -logp.mean() / jnp.log(2.0)
        return -jnp.mean(logp)

    y = jnp.float32(labels(34, (7, 3), 2))
    return Problem(loss, params, (draw(33, 7, 6), y), module, torch_loss)


def smooth_l1(mistake: str) -> Problem:
    """Huber's loss is `beta` times PyTorch's smooth L1."""
    module = seeded(
        23, lambda: nn.Sequential(nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 3))
    )
    t = arrays_of(module)
    params = [(t["0.weight"].T, t["0.bias"]), (t["2.weight"].T, t["2.bias"])]
    if mistake == "transposed":
        params[0] = (t["0.weight"], t["0.bias"])
    if mistake == "no_bias":
        params[1] = params[1][:1]

    def torch_loss(module, x, y):
        return F.smooth_l1_loss(module(x), y, beta=0.5)

    def dense(layer, x):
        h = x @ layer[0]
        return h + layer[1] if len(layer) == 2 else h

    def loss(params, x, y):
        prediction = dense(params[1], jax.nn.elu(dense(params[0], x)))
        delta = 1.0 if mistake == "beta" else 0.5
        losses = optax.huber_loss(prediction, y, delta=delta)
        if mistake == "huber":
            return losses.mean()
        if mistake == "sum":
            return losses.sum() / delta
        return losses.mean() / delta

    return Problem(loss, params, (draw(35, 10, 4), draw(36, 10, 3)), module, torch_loss)


def kl_divergence(mistake: str) -> Problem:
    """A student, taught by what it says itself of a clean input."""
    module = seeded(
        24, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
    )
    t = arrays_of(module)
    params = {
        "hidden": {"w": t["0.weight"], "b": t["0.bias"]},
        "out": {"w": t["2.weight"], "b": t["2.bias"]},
    }
    temperature = 2.0

    def torch_loss(module, x, noise):
        teacher = F.softmax(module(x).detach() / temperature, -1)
        student = F.log_softmax(module(x + noise) / temperature, -1)
        divergence = F.kl_div(student, teacher, reduction="batchmean")
        return divergence * temperature**2

    def logits(params, x):
        h = jnp.tanh(x @ params["hidden"]["w"].T + params["hidden"]["b"])
        return h @ params["out"]["w"].T + params["out"]["b"]

    def loss(params, x, noise):
        axis = 0 if mistake == "axis" else -1
        held = params if mistake == "teacher_learns" else lax.stop_gradient(params)
        teacher = jax.nn.log_softmax(logits(held, x) / temperature, axis)
        student = jax.nn.log_softmax(logits(params, x + noise) / temperature, axis)
        pair = (teacher, student) if mistake == "reversed" else (student, teacher)
        divergence = optax.losses.kl_divergence_with_log_targets(*pair)
        divergence = divergence.mean() / (5 if mistake == "mean" else 1)
        return divergence * (1 if mistake == "no_temperature" else temperature**2)

    return Problem(loss, params, (draw(37, 9, 5), draw(38, 9, 5)), module, torch_loss)


class EquinoxDropout(eqx.Module):
    fc1: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    fc2: eqx.nn.Linear

    def __call__(self, x, key):
        h = self.dropout(jax.nn.relu(self.fc1(x)), key=key)
        return self.fc2(h)


def mse_dropout(mistake: str) -> Problem:
    """Dropout in evaluation mode does nothing; Equinox."""

    def make():
        module = nn.Sequential(
            nn.Linear(5, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3)
        )
        return module.train(mistake == "torch_in_train_mode")

    module = seeded(25, make)
    if mistake == "frozen":
        module[0].bias.requires_grad_(False)
    model = EquinoxDropout(
        eqx.nn.Linear(5, 20, key=jax.random.key(0)),
        eqx.nn.Dropout(0.5, inference=mistake != "jax_in_train_mode"),
        eqx.nn.Linear(20, 3, key=jax.random.key(0)),
    )
    model = eqx.tree_at(
        lambda m: (m.fc1.weight, m.fc1.bias, m.fc2.weight, m.fc2.bias),
        model,
        tuple(as_jax(p) for p in module.parameters()),
    )

    def loss(model, x, y):
        if mistake == "scaled":  # as dropout once was: scaled when it is evaluated
            model = eqx.tree_at(lambda m: m.dropout, model, lambda h, key: 0.5 * h)
        keys = jax.random.split(jax.random.key(1), len(x))
        return mse(jax.vmap(model)(x, keys), y) * (2 if mistake == "twice" else 1)

    return Problem(loss, model, (draw(39, 8, 5), draw(40, 8, 3)), module, torch_mse)


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 6)
        self.mean = nn.Linear(6, 3)
        self.log_variance = nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.mean(h), self.log_variance(h)


def gaussian_nll(mistake: str) -> Problem:
    """Two heads, which are one product in JAX."""
    module = seeded(26, Gaussian)
    t = arrays_of(module)
    heads = ["mean", "log_variance"]
    if mistake == "swapped":
        heads.reverse()
    params = {
        "trunk": {"w": t["trunk.weight"].T, "b": t["trunk.bias"]},
        "heads": {
            "w": jnp.concatenate([t[f"{head}.weight"].T for head in heads], 1),
            "b": jnp.concatenate([t[f"{head}.bias"] for head in heads]),
        },
    }

    def torch_loss(module, x, y):
        mean, log_variance = module(x)
        return F.gaussian_nll_loss(mean, y, log_variance.exp())

    def loss(params, x, y):
        trunk, heads = params["trunk"], params["heads"]
        h = jnp.tanh(x @ trunk["w"] + trunk["b"])
        if mistake == "stopped":
            h = lax.stop_gradient(h)
        mean, log_variance = jnp.split(h @ heads["w"] + heads["b"], 2, axis=-1)
        nll = (y - mean) ** 2 * jnp.exp(-log_variance) + log_variance
        if mistake == "sum_of_outputs":
            return 0.5 * nll.sum(-1).mean()
        return nll.mean() if mistake == "no_half" else 0.5 * nll.mean()

    return Problem(loss, params, (draw(41, 9, 5), draw(42, 9, 3)), module, torch_loss)


def weighted_nll(mistake: str) -> Problem:
    """Classes are weighted; the mean is over the weights. Images of one line."""
    module = seeded(
        27,
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 3),
            nn.LogSoftmax(dim=0 if mistake == "axis" else 1),
        ),
    )
    t = arrays_of(module)
    head = t["3.weight"].reshape(3, 4, 5).transpose(2, 1, 0)
    if mistake == "flatten":
        head = t["3.weight"].T.reshape(5, 4, 3)
    params = {
        "conv": t["0.weight"].transpose(2, 1, 0),
        "conv_bias": t["0.bias"],
        "head": head,
        "head_bias": t["3.bias"],
    }
    class_weights = jnp.array([0.5, 1.0, 2.5])

    def torch_loss(module, x, y):
        return F.nll_loss(module(x), y, weight=torch.tensor([0.5, 1.0, 2.5]))

    def loss(params, x, y):
        dims = ("NWC", "WIO", "NWC")
        h = lax.conv_general_dilated(x, params["conv"], (1,), "SAME", None, None, dims)
        h = jax.nn.relu(h + params["conv_bias"])
        logits = jnp.einsum("nwc,wco->no", h, params["head"]) + params["head_bias"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        weights = class_weights[y]
        if mistake == "divided_by_batch":
            return jnp.mean(weights * nll)
        return jnp.sum(weights * nll) / jnp.sum(weights)

    x, y = draw(43, 8, 5, 2), labels(44, 8, 3)
    options = {"torch_args": (tensor(x).mT.contiguous(), tensor(y))}
    return Problem(loss, params, (x, y), module, torch_loss, options)


PORTS: tuple[Port, ...] = (
    *ports(
        label_smoothing,
        unsmoothed=("label_smoothing",),
        other_smoothing=("label_smoothing",),
        others_only=("label_smoothing",),
        axis=("softmax_axis",),
        softmax_in_the_model=("activation", "3", ""),
        sum=("reduction",),
    ),
    *ports(
        bce_with_logits,
        likelihood=("sign",),
        sum_of_labels=("reduction",),
        bits=("factor",),
        slope=("activation", "1"),
        no_grad=("missing_gradient", "0.weight", "0.bias"),
    ),
    *ports(
        smooth_l1,
        huber=("factor",),
        beta=("factor|unknown",),
        sum=("reduction",),
        transposed=("transposed", "0", "0.weight", "[0][0]"),
        no_bias=("bias", "2", "2.bias"),
    ),
    *ports(
        kl_divergence,
        mean=("reduction",),
        no_temperature=("factor",),
        reversed=("swapped|unknown",),
        teacher_learns=("missing_gradient", "2.weight", "2.bias"),
        axis=("softmax_axis",),
    ),
    *ports(
        mse_dropout,
        torch_in_train_mode=("train_mode", "2"),
        jax_in_train_mode=("train_mode", "2"),
        scaled=("factor", "2", "3"),
        twice=("factor",),
        frozen=("missing_gradient", "0.bias"),
    ),
    *ports(
        gaussian_nll,
        swapped=("swapped|permuted", "mean", "mean.weight", "log_variance.weight"),
        stopped=("missing_gradient", "trunk.weight", "trunk.bias"),
        no_half=("factor",),
        sum_of_outputs=("reduction",),
    ),
    *ports(
        weighted_nll,
        divided_by_batch=("factor|reduction",),
        axis=("softmax_axis", "4"),
        flatten=("permuted", "2", "3", "3.weight", "head"),
    ),
)
