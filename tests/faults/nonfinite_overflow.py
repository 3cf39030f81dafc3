"""Overflow, in float32 and float16, forward and backward."""

import jax.numpy as jnp

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


@nonfinite(CASES, "overflow", phase="forward", index=(1,))
def softmax_by_hand():
    def loss(logits, y):
        e = jnp.exp(logits)  # blame
        p = e / e.sum()
        return jnp.sum((p - y) ** 2)

    return Problem(loss, jnp.array([1.0, 100.0]), (jnp.array([0.0, 1.0]),))


@nonfinite(CASES, "overflow", phase="forward", index=(0,))
def softplus_by_hand():
    def loss(w):
        return jnp.sum(jnp.log(1 + jnp.exp(w)))  # blame

    return Problem(loss, jnp.array([90.0, 1.0]))


@nonfinite(CASES, "overflow", phase="forward", index=(1,))
def float16_squares():
    def loss(w, x, y):
        error = (x * w - y) ** 2  # blame
        return jnp.mean(error)

    x, y = jnp.array([1.0, 400.0], jnp.float16), jnp.zeros(2, jnp.float16)
    return Problem(loss, jnp.float16(1.0), (x, y))


@nonfinite(CASES, "overflow", phase="forward")
def float16_sum():
    def loss(w, x):
        total = jnp.sum(x * w)  # blame
        return (total / len(x)).astype(jnp.float32)

    return Problem(loss, jnp.float16(1.0), (jnp.full(200, 500.0, jnp.float16),))


@nonfinite(CASES, "overflow", phase="backward")
def float16_loss_scale():
    """The scaled loss still fits in float16, the cotangent doesn't."""

    def loss(w, scale):
        h = 100 * w  # blame
        return h * scale

    return Problem(loss, jnp.float16(0.01), (jnp.float16(10000.0),))


@nonfinite(CASES, "overflow", phase="backward", index=(0,))
def exploding_product_of_slopes():
    """Every forward value is small; the slopes 1e20 and 1e20 are not, together."""

    def loss(w, x):
        h = jnp.sin(w * 1e20)  # blame
        return jnp.sum(jnp.sin(h * 1e20) * x)

    return Problem(loss, jnp.zeros(2), (jnp.ones(2),))
