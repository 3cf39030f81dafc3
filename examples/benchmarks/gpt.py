"""A GPT in plain JAX, each block written out: a long program to trace and compile."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Sizes(NamedTuple):
    """How large the model is, and its batch."""

    blocks: int = 12
    heads: int = 4
    width: int = 128
    batch: int = 2
    sequence: int = 64
    vocabulary: int = 256


def problem(sizes):
    """`(params, tokens)`: a dict for each block."""
    rng = np.random.default_rng(0)
    width = sizes.width

    def draw(*shape):
        scale = np.float32(shape[0] ** -0.5)
        return jnp.asarray(rng.standard_normal(shape, np.float32) * scale)

    def norm():
        return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}

    def block():
        return {
            "norm1": norm(),
            "attention": {"qkv": draw(width, 3 * width), "out": draw(width, width)},
            "norm2": norm(),
            "mlp": {
                "in": {"w": draw(width, 4 * width), "b": jnp.zeros(4 * width)},
                "out": {"w": draw(4 * width, width), "b": jnp.zeros(width)},
            },
        }

    params = {
        "tokens": draw(sizes.vocabulary, width),
        "places": draw(sizes.sequence, width),
        "blocks": [block() for _ in range(sizes.blocks)],
        "norm": norm(),
        "head": draw(width, sizes.vocabulary),
    }
    shape = sizes.batch, sizes.sequence + 1
    return params, jnp.asarray(rng.integers(0, sizes.vocabulary, shape))


def new_loss(sizes):
    """A new function, for which nothing is compiled yet."""

    def normed(p, x):
        x = x - jnp.mean(x, -1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
        return x / deviation * p["scale"] + p["shift"]

    def attention(p, x):
        parts = jnp.split(x @ p["qkv"], 3, axis=-1)
        shape = *x.shape[:2], sizes.heads, -1
        q, k, v = (part.reshape(shape).transpose(0, 2, 1, 3) for part in parts)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), -1)
        return (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape) @ p["out"]

    def mlp(p, x):
        h = jax.nn.gelu(x @ p["in"]["w"] + p["in"]["b"])
        return h @ p["out"]["w"] + p["out"]["b"]

    def loss(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = params["tokens"][inputs] + params["places"]
        for block in params["blocks"]:
            x = x + attention(block["attention"], normed(block["norm1"], x))
            x = x + mlp(block["mlp"], normed(block["norm2"], x))
        log_odds = jax.nn.log_softmax(normed(params["norm"], x) @ params["head"])
        return -jnp.mean(jnp.take_along_axis(log_odds, targets[..., None], -1))

    return loss
