"""Bad data, parameters and literals; masks; NaNs that come to nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from corpus.case import draw
from jax import lax

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


# Data, parameters and literals that are bad from the start


@nonfinite(CASES, "non-finite input", phase="forward", index=(2, 1), origin="args[0]")
def nan_in_a_batch():
    def loss(params, x, y):
        h = x @ params["w"]  # blame
        return jnp.mean((h + params["b"] - y) ** 2)

    params = {"w": draw(6, 2), "b": jnp.float32(0.0)}
    return Problem(loss, params, (draw(7, 4, 2).at[2, 1].set(jnp.nan), draw(8, 4)))


@nonfinite(
    CASES, "non-finite input", phase="forward", index=(1,), origin="args[1].label"
)
def missing_label_times_zero():
    def loss(w, x, batch):
        error = x @ w - batch["label"]  # blame
        return jnp.sum(batch["mask"] * error**2)

    batch = {"label": jnp.array([1.0, jnp.nan]), "mask": jnp.array([1.0, 0.0])}
    return Problem(loss, draw(9, 3), (draw(10, 2, 3), batch))


@nonfinite(
    CASES, "non-finite input", phase="forward", index=(1,), origin="layers[1].scale"
)
def infinite_parameter():
    def loss(params, x):
        h = jnp.tanh(x * params["layers"][0]["scale"])
        h = h * params["layers"][1]["scale"]  # blame
        return jnp.mean(h**2)

    layers = [{"scale": jnp.ones(2)}, {"scale": jnp.array([1.0, jnp.inf])}]
    return Problem(loss, {"layers": layers}, (draw(11, 3, 2),))


@nonfinite(CASES, "non-finite input", phase="forward")
def nan_as_a_literal():
    def loss(w, x):
        h = jnp.where(x > 0, x, jnp.nan)  # blame
        return jnp.sum((h * w) ** 2)

    return Problem(loss, jnp.float32(2.0), (jnp.array([1.0, -1.0]),))


@nonfinite(CASES, "non-finite input", phase="forward", index=(0, 1))
def nan_in_a_constant_of_the_closure():
    table = np.array([[1.0, np.nan], [2.0, 3.0]], np.float32)

    def loss(w):
        scores = table * w  # blame
        return jnp.sum(scores)

    return Problem(loss, jnp.float32(2.0))


# Masks


@nonfinite(CASES, "zero times infinity", "non-finite input", phase="forward")
def mask_multiplied_by_infinity():
    def loss(scores, mask):
        bias = (1 - mask) * -jnp.inf  # blame
        return jnp.sum(jax.nn.softmax(scores + bias)[:1])

    return Problem(loss, draw(12, 3), (jnp.array([1.0, 1.0, 0.0]),))


@nonfinite(CASES, "empty softmax", index=(1,))
def softmax_of_a_fully_masked_row():
    def loss(w, x, mask):
        scores = jnp.where(mask, x @ w @ x.T, -jnp.inf)
        attention = jax.nn.softmax(scores, axis=-1)  # blame
        return jnp.sum(attention @ x)

    mask = jnp.array([[True, True, False], [False] * 3, [True] * 3])
    return Problem(loss, draw(13, 2, 2), (draw(14, 3, 2), mask))


@nonfinite(CASES, "empty softmax")
def logsumexp_of_nothing():
    def loss(w, mask):
        kept = jnp.where(mask, w, -jnp.inf)
        return jax.nn.logsumexp(kept)  # blame

    return Problem(loss, draw(15, 3), (jnp.zeros(3, bool),))


@nonfinite(CASES, "infinity minus infinity", "empty softmax", phase="forward")
def masked_row_less_its_maximum():
    def loss(w, mask):
        scores = jnp.where(mask, w, -jnp.inf)
        top = scores.max(-1, keepdims=True)
        e = jnp.exp(scores - top)  # blame
        return jnp.sum(e / e.sum(-1, keepdims=True) * w)

    mask = jnp.array([[True, True], [False, False]])
    return Problem(loss, draw(16, 2, 2), (mask,))


# NaNs that come to nothing


@nonfinite(CASES, "domain", phase="forward", index=(1,), harmless=True)
def dropped_nan_of_the_data():
    def loss(w, x):
        logs = jnp.log(x)  # blame
        features = jnp.where(x > 0, logs, 0.0)
        return jnp.sum((features * w) ** 2)

    return Problem(loss, jnp.float32(0.5), (jnp.array([2.0, -1.0]),))


@nonfinite(CASES, "division by zero", phase="forward", harmless=True)
def nan_in_a_metric():
    """It is in the aux output alone."""

    def loss(w, x, mask):
        error = (x * w - 1) ** 2
        metric = jnp.sum(lax.stop_gradient(error) * mask) / jnp.sum(mask)  # blame
        return jnp.mean(error), {"masked error": metric}

    return Problem(loss, jnp.float32(2.0), (draw(17, 3), jnp.zeros(3)), has_aux=True)


@nonfinite(CASES, "domain", phase="forward", index=(0,), harmless=True)
def nan_that_only_chooses():
    def loss(w, x):
        score = jnp.sqrt(x - 1)  # blame
        best = jnp.nanargmax(score)
        return (w[best] - 2) ** 2 + jnp.sum(w**2)

    return Problem(loss, draw(18, 3), (jnp.array([0.5, 2.0, 1.5]),))
