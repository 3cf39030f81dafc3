"""One small network and many optimizers: pairs that agree, and pairs that don't."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F
from torch import nn as tnn

from ports.case import Port, Problem, arrays_of, draw, seeded


def mlp_params(arrays):
    return [{"w": arrays[f"{k}.weight"].T, "b": arrays[f"{k}.bias"]} for k in (0, 2)]


def training(optimizer=None, torch_optimizer=None, scale=1.0, steps=5):
    """The same network and data for all; `scale` is the loss's, for small gradients.

    `optimizer` makes optax's. Where neither is given, it's plain gradient descent.
    """

    def build():
        return tnn.Sequential(tnn.Linear(5, 8), tnn.Tanh(), tnn.Linear(8, 2))

    module = seeded(0, build)
    params = mlp_params(arrays_of(module))

    def loss(params, x, y):
        first, second = params
        h = jnp.tanh(x @ first["w"] + first["b"])
        return scale * jnp.mean((h @ second["w"] + second["b"] - y) ** 2)

    def torch_loss(module, x, y):
        return scale * F.mse_loss(module(x), y)

    options: dict[str, Any] = {"steps": steps}
    if optimizer is not None:
        options |= {"optimizer": optimizer(), "torch_optimizer": torch_optimizer}
    args = (draw(1, 6, 5), draw(2, 6, 2, scale=2.0))
    return Problem(loss, params, args, module, torch_loss, options)


# What people write by hand


def without_bias_correction(rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam, but its averages start at zero and nobody makes up for it."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    def update(grads, state, params=None):
        m, v = state
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, grads)
        step = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), m, v)
        return step, (m, v)

    return optax.GradientTransformation(init, update)


def accumulated():
    """The sum of all gradients so far, as PyTorch has it without `zero_grad`."""

    def update(grads, total, params=None):
        total = jax.tree.map(jnp.add, total, grads)
        return total, total

    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, update)


class NeverZeroed(torch.optim.SGD):
    """As if the call of `zero_grad` were forgotten."""

    def zero_grad(self, set_to_none=True):
        pass


def clipped(ps, *, value=None, norm=None):
    ps = list(ps)
    optimizer = torch.optim.SGD(ps, lr=0.1)

    def clip(*_):
        if value is not None:
            tnn.utils.clip_grad_value_(ps, value)
        if norm is not None:
            tnn.utils.clip_grad_norm_(ps, norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def decayed(ps):
    """The learning rate times 0.7 after each step."""
    optimizer = torch.optim.SGD(ps, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


_sgd = partial(partial, torch.optim.SGD, lr=0.1)
_adam = partial(partial, torch.optim.Adam, lr=1e-2)
_adamw = partial(partial, torch.optim.AdamW, lr=1e-2)
_rmsprop = partial(partial, torch.optim.RMSprop, lr=1e-2)
_schedule = optax.exponential_decay(0.1, 1, 0.7)


def _pair(name, optimizer, torch_optimizer, kind="", **options):
    make = partial(training, optimizer, torch_optimizer, **options)
    return Port(name, make, kind)


PORTS: tuple[Port, ...] = (
    Port("descent", training),
    # Pairs that agree.
    _pair(
        "momentum",
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        _sgd(momentum=0.9, nesterov=True),
    ),
    _pair(
        "decay_in_sgd",
        lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, 0.9)),
        _sgd(momentum=0.9, weight_decay=0.01),
    ),
    _pair("adam", lambda: optax.adam(1e-2), _adam()),
    _pair("adamw", lambda: optax.adamw(1e-2, weight_decay=1e-2), _adamw()),
    _pair(
        "rmsprop",
        lambda: optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False),
        _rmsprop(),
    ),
    _pair(
        "adagrad",
        lambda: optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
        partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.1, eps=0.0),
    ),
    _pair(
        "clipped",
        lambda: optax.chain(optax.clip(0.05), optax.sgd(0.1)),
        partial(clipped, value=0.05),
    ),
    _pair("schedule", lambda: optax.sgd(_schedule), decayed),
    # Pairs that don't.
    _pair(
        "descent-learning_rate",
        lambda: optax.sgd(0.2),
        _sgd(),
        "learning_rate",
    ),
    _pair(
        "descent-uphill",
        lambda: optax.scale(0.1),
        _sgd(),
        "sign|learning_rate",
    ),
    _pair(
        "descent-zero_grad_forgotten",
        lambda: optax.sgd(0.1),
        lambda ps: NeverZeroed(ps, lr=0.1),
        "accumulated",
    ),
    _pair(
        "descent-accumulated_in_jax",
        lambda: optax.chain(accumulated(), optax.sgd(0.1)),
        _sgd(),
        "accumulated",
    ),
    _pair(
        "momentum-nesterov",
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        _sgd(momentum=0.9),
        "nesterov",
    ),
    _pair(
        "momentum-nesterov_in_torch",
        lambda: optax.sgd(0.1, momentum=0.9),
        _sgd(momentum=0.9, nesterov=True),
        "nesterov",
    ),
    _pair(
        "momentum-dampening",
        lambda: optax.sgd(0.1, momentum=0.9),
        _sgd(momentum=0.9, dampening=0.1),
        "dampening",
    ),
    _pair(
        "momentum-average",  # an average of gradients, where PyTorch has a sum
        lambda: optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1)),
        _sgd(momentum=0.9),
        "dampening|learning_rate",
    ),
    _pair(
        "momentum-missing",
        lambda: optax.sgd(0.1),
        _sgd(momentum=0.9),
        "momentum",
    ),
    _pair(
        "momentum-value",
        lambda: optax.sgd(0.1, momentum=0.99),
        _sgd(momentum=0.9),
        "momentum",
    ),
    _pair(
        "decay_in_sgd-missing",
        lambda: optax.sgd(0.1, momentum=0.9),
        _sgd(momentum=0.9, weight_decay=0.01),
        "weight_decay",
    ),
    _pair(
        "adam-coupled_decay",
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        _adam(weight_decay=0.1),
        "weight_decay",
    ),
    _pair(
        "adamw-default_decay",
        lambda: optax.adamw(1e-2),
        _adamw(),
        "weight_decay",
    ),
    _pair(
        "adamw-no_decay",
        lambda: optax.adam(1e-2),
        _adamw(weight_decay=0.1),
        "weight_decay",
    ),
    _pair(
        "adam-eps",
        lambda: optax.adam(1e-2, eps=1e-6),
        _adam(eps=1e-8),
        "optimizer_epsilon",
        scale=1e-4,
    ),
    _pair(
        "adam-eps_in_torch",
        lambda: optax.adam(1e-2),
        _adam(eps=1e-3),
        "optimizer_epsilon",
    ),
    _pair(
        "adam-eps_root",
        lambda: optax.adam(1e-2, eps=0.0, eps_root=1e-8),
        _adam(eps=1e-8),
        "optimizer_epsilon",
        scale=1e-2,
    ),
    _pair(
        "adam-bias_correction",
        lambda: without_bias_correction(1e-2),
        _adam(),
        "bias_correction",
    ),
    _pair(
        "adam-betas",
        lambda: optax.adam(1e-2, b2=0.95),
        _adam(),
        "betas",
    ),
    _pair(
        "adam-first_beta",
        lambda: optax.adam(1e-2, b1=0.5),
        _adam(),
        "betas",
    ),
    _pair(
        "adamw-learning_rate",
        lambda: optax.adamw(1e-3, weight_decay=1e-2),
        _adamw(),
        "learning_rate",
    ),
    _pair(
        "rmsprop-decay",
        lambda: optax.rmsprop(1e-2, eps_in_sqrt=False),
        _rmsprop(),
        "betas",
    ),
    _pair(
        "rmsprop-eps_in_sqrt",
        lambda: optax.rmsprop(1e-2, decay=0.99),
        _rmsprop(),
        "optimizer_epsilon",
        scale=1e-2,
    ),
    _pair(
        "adagrad-first_sum",
        lambda: optax.adagrad(0.1),
        partial(torch.optim.Adagrad, lr=0.1),
        "optimizer_epsilon|unknown",
    ),
    _pair(
        "clipped-in_jax",
        lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
        _sgd(),
        "clipping",
    ),
    _pair(
        "clipped-in_torch",
        lambda: optax.sgd(0.1),
        partial(clipped, norm=0.5),
        "clipping",
    ),
    _pair("schedule-in_jax", lambda: optax.sgd(_schedule), _sgd(), "schedule"),
    _pair("schedule-in_torch", lambda: optax.sgd(0.1), decayed, "schedule"),
)
