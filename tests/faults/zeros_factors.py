"""Gradients that are all zero: zero factors, discarded, cancelled, never used."""

import jax.numpy as jnp
from corpus.case import draw

from faults.case import NEVER_USED, Problem, Zero, zero

CASES: list[Zero] = []


# Factors that are zero


@zero(CASES, {"a": ("zero factor",)})
def low_rank_adapter():
    def loss(params, frozen, x, y):
        low = x @ params["a"]
        update = low @ params["b"]  # blame
        return jnp.mean((x @ frozen + update - y) ** 2)

    params = {"a": draw(37, 4, 2), "b": jnp.zeros((2, 3))}
    return Problem(loss, params, (draw(38, 4, 3), draw(39, 5, 4), draw(40, 5, 3)))


@zero(CASES, {"centre": ("zero factor",)})
def loss_weight_of_zero():
    def loss(params, x):
        fit = jnp.mean((x * params["w"] - 1) ** 2)
        penalty = jnp.sum((params["w"] + params["centre"]) ** 2)
        return fit + 0.0 * penalty  # blame

    params = {"centre": draw(41, 3), "w": draw(42, 3)}
    return Problem(loss, params, (draw(43, 3),))


@zero(CASES, {"head": ("zero factor",)})
def loss_weight_of_zero_in_the_data():
    def loss(params, x, weights):
        h = jnp.tanh(x @ params["body"])
        main = jnp.mean(h**2)
        extra = jnp.mean((h @ params["head"] - 1) ** 2)
        return weights["main"] * main + weights["extra"] * extra  # blame

    params = {"body": draw(44, 3, 2), "head": draw(45, 2)}
    weights = {"main": jnp.float32(1.0), "extra": jnp.float32(0.0)}
    return Problem(loss, params, (draw(46, 4, 3), weights))


@zero(CASES, {"w": ("zero factor",)})
def inputs_that_are_all_zero():
    def loss(params, x, y):
        out = x @ params["w"] + params["b"]  # blame
        return jnp.mean((out - y) ** 2)

    params = {"b": jnp.float32(0.1), "w": draw(47, 3)}
    return Problem(loss, params, (jnp.zeros((4, 3)), draw(48, 4)))


# Discarded, cancelled, at a minimum, never used


@zero(CASES, {"first": ("discarded",)})
def overwritten():
    def loss(params, x):
        h = jnp.tanh(x @ params["first"])  # blame
        h = jnp.tanh(x @ params["second"])
        return jnp.sum(h**2)

    params = {"first": draw(49, 3, 2), "second": draw(50, 3, 2)}
    return Problem(loss, params, (draw(51, 4, 3),))


@zero(CASES, {"extra": ("discarded",)})
def sliced_away():
    def loss(params, x):
        heads = jnp.concatenate([x @ params["main"], x @ params["extra"]], -1)
        kept = heads[:, :2]  # blame
        return jnp.sum(kept**2)

    params = {"extra": draw(52, 3, 2), "main": draw(53, 3, 2)}
    return Problem(loss, params, (draw(54, 4, 3),))


@zero(CASES, {"w": ("cancellation",)})
def difference_of_the_same():
    def loss(params, x):
        h = params["w"] * x
        gap = h - h  # blame
        return jnp.sum((gap - params["b"]) ** 2)

    params = {"b": jnp.float32(0.5), "w": draw(55, 3)}
    return Problem(loss, params, (draw(56, 3),))


@zero(CASES, {"shift": ("cancellation",)})
def shift_before_centring():
    def loss(params, x):
        h = x * params["w"] + params["shift"]  # or
        centred = h - jnp.mean(h)  # blame
        return jnp.dot(centred, jnp.array([1.0, -2.0, 3.0, 2.0]))

    params = {"shift": jnp.float32(0.3), "w": jnp.float32(2.0)}
    return Problem(loss, params, (jnp.array([1.0, 2.0, 4.0, 3.0]),))


@zero(CASES, {"b": ("at a minimum",), "w": ("at a minimum",)})
def perfect_fit():
    def loss(params, x, y):
        residual = x @ params["w"] + params["b"] - y
        return jnp.mean(residual**2)  # blame

    params = {"b": jnp.float32(1.0), "w": jnp.array([2.0, -1.0])}
    x = jnp.array([[1.0, 2.0], [3.0, 1.0]])
    return Problem(loss, params, (x, jnp.array([1.0, 6.0])))


@zero(CASES, {"tilt": ("at a minimum",)})
def bottom_of_a_penalty():
    def loss(params, x):
        penalty = jnp.square(params["tilt"])  # blame
        return jnp.sum((x * params["w"]) ** 2) + penalty

    params = {"tilt": jnp.float32(0.0), "w": draw(57, 3)}
    return Problem(loss, params, (draw(58, 3),))


@zero(CASES, {"forgotten": NEVER_USED})
def forgotten_parameter():
    def loss(params, x):
        return jnp.sum((x * params["w"]) ** 2)

    params = {"forgotten": draw(59, 2), "w": draw(60, 3)}
    return Problem(loss, params, (draw(61, 3),))
