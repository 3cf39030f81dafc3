"""Correct losses as people write them with Equinox, Flax and optax."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch.nn.functional as tf
from flax import nnx
from jax import lax

from corpus.case import Case, Problem, case, draw

CASES: list[Case] = []


def mean_squared(prediction, y):
    return jnp.mean((prediction - y) ** 2)


# Equinox: the whole module is params


@case(CASES)
def equinox_mlp(plant):
    squared = plant(mean_squared)

    def loss(model, x, y):
        return squared(jax.vmap(model)(x), y)

    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    return Problem(loss, model, (draw(0, 6, 3), draw(1, 6, 2)))


@case(CASES)
def equinox_attention(plant):
    @plant
    def pooled(h):
        return jnp.tanh(h).mean(0)

    def loss(model, x, y):
        return jnp.sum((pooled(model(x, x, x)) - y) ** 2)

    model = eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(1))
    return Problem(loss, model, (draw(2, 5, 8), draw(3, 8)))


@case(CASES)
def equinox_gru(plant):
    @plant
    def readout(h, weight):
        return h @ weight

    def loss(params, xs, y):
        cell, weight = params
        start = jnp.zeros_like(weight)
        h, _ = lax.scan(lambda h, x: (cell(x, h), None), start, xs)
        return (readout(h, weight) - y) ** 2

    params = (eqx.nn.GRUCell(2, 4, key=jax.random.key(2)), draw(4, 4))
    return Problem(loss, params, (draw(5, 6, 2), jnp.float32(0.5)))


@case(CASES)
def equinox_conv(plant):
    @plant
    def flattened(h):
        return h.reshape(len(h), -1)

    def loss(layers, x, y):
        conv, pool, linear = layers
        h = jax.vmap(lambda image: pool(jax.nn.relu(conv(image))))(x)
        logits = jax.vmap(linear)(flattened(h))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    one, two = jax.random.split(jax.random.key(3))
    layers = [
        eqx.nn.Conv2d(1, 3, 3, key=one),
        eqx.nn.AvgPool2d(2, 2),
        eqx.nn.Linear(27, 3, key=two),
    ]
    return Problem(loss, layers, (draw(6, 3, 1, 8, 8), jnp.array([0, 2, 1])))


@case(CASES)
def equinox_transformer_block(plant):
    @plant
    def residual(update, h):
        return h + update

    def loss(model, x):
        normed = jax.vmap(model["norm"])(x)
        h = residual(model["attention"](normed, normed, normed), x)
        return jnp.mean(jax.vmap(model["mlp"])(h) ** 2)

    one, two = jax.random.split(jax.random.key(4))
    model = {
        "norm": eqx.nn.LayerNorm(4),
        "attention": eqx.nn.MultiheadAttention(2, 4, key=one),
        "mlp": eqx.nn.MLP(4, 4, 8, 1, activation=jax.nn.gelu, key=two),
    }
    return Problem(loss, model, (draw(7, 5, 4),))


# Flax Linen: params is what `init` gives


class Perceptron(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm()(linen.Dense(6)(x))
        return linen.Dense(2)(jnp.tanh(x))


@case(CASES)
def linen_mlp(plant):
    squared = plant(mean_squared)
    model, x = Perceptron(), draw(8, 5, 3)

    def loss(variables, x, y):
        return squared(model.apply(variables, x), y)

    return Problem(loss, model.init(jax.random.key(5), x), (x, draw(9, 5, 2)))


class Recogniser(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        return linen.Dense(3)(x.reshape(len(x), -1))


@case(CASES)
def linen_conv(plant):
    @plant
    def cross_entropy(logits, y):
        return optax.softmax_cross_entropy(logits, y).mean()

    model, x = Recogniser(), draw(10, 3, 6, 6, 1)

    def loss(params, x, y):
        return cross_entropy(model.apply({"params": params}, x), y)

    return Problem(loss, model.init(jax.random.key(6), x)["params"], (x, jnp.eye(3)))


# Flax NNX: params is the model's state


@case(CASES)
def nnx_mlp(plant):
    squared = plant(mean_squared)

    class Mlp(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 6, rngs=rngs)
            self.outer = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.gelu(self.inner(x)))

    graph, params = nnx.split(Mlp(nnx.Rngs(0)), nnx.Param)

    def loss(params, x, y):
        return squared(nnx.merge(graph, params)(x), y)

    return Problem(loss, params, (draw(11, 5, 3), draw(12, 5, 2)))


@case(CASES)
def nnx_dropout(plant):
    """The state holds the counter and the key of the dropout too."""
    squared = plant(mean_squared)
    rngs = nnx.Rngs(1)
    layers = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
    # The rate's dtype is that of the draws, which should not depend on x64.
    half = nnx.Dropout(np.float32(0.5), rngs=rngs)
    model = nnx.Sequential(layers[0], half, layers[1])
    graph, state = nnx.split(model)

    def loss(state, x, y):
        # Without the copy, a call that isn't traced would count on in `state`.
        return squared(nnx.merge(graph, state, copy=True)(x), y)

    return Problem(loss, state, (draw(13, 6, 3), draw(14, 6, 2)))


# optax's losses


def torch_huber(weight, x, y):
    return tf.huber_loss(x @ weight, y, delta=0.8)


@case(CASES, twin=torch_huber)
def optax_huber(plant):
    @plant
    def huber(prediction, y):
        return optax.huber_loss(prediction, y, delta=0.8)

    def loss(weight, x, y):
        return jnp.mean(huber(x @ weight, y))

    return Problem(loss, draw(15, 4, 4), (draw(16, 8, 4), draw(17, 8, 4)))


def torch_smoothed(weight, x, y):
    return tf.cross_entropy(x @ weight, y, label_smoothing=0.1)


@case(CASES, twin=torch_smoothed)
def optax_smoothed_cross_entropy(plant):
    @plant
    def cross_entropy(logits, targets):
        return optax.softmax_cross_entropy(logits, targets)

    def loss(weight, x, y):
        targets = optax.smooth_labels(jax.nn.one_hot(y, 4, dtype=x.dtype), 0.1)
        return jnp.mean(cross_entropy(x @ weight, targets))

    return Problem(loss, draw(18, 3, 4), (draw(19, 5, 3), jnp.array([0, 3, 2, 1, 1])))


@case(CASES)
def optax_ctc(plant):
    @plant
    def alignment(logits, labels):
        zero = jnp.zeros_like
        return optax.ctc_loss(logits, zero(logits[..., 0]), labels, zero(labels) * 0.0)

    def loss(weight, x, labels):
        return jnp.mean(alignment(x @ weight, labels))

    labels = jnp.array([[1, 2, 2], [3, 1, 2]])
    return Problem(loss, draw(20, 3, 4), (draw(21, 2, 8, 3), labels))


@case(CASES)
def optax_assorted(plant):
    @plant
    def similarity(a, b):
        return optax.cosine_similarity(a, b, epsilon=1e-6)

    def loss(weight, x, y):
        z = x @ weight
        probabilities = jax.nn.softmax(y)
        return jnp.mean(
            similarity(z, y)
            + optax.kl_divergence(jax.nn.log_softmax(z), probabilities)
            + optax.log_cosh(z, y).sum(-1)
            + optax.sigmoid_focal_loss(z, probabilities).sum(-1)
        )

    return Problem(loss, draw(22, 4, 4), (draw(23, 6, 4), draw(24, 6, 4)))


@case(CASES)
def optax_hinge_beside_the_kink(plant):
    @plant
    def hinge(scores, signs):
        return optax.hinge_loss(scores, signs)

    def loss(params, x, signs):
        scores = x @ params["weight"] + params["bias"]
        return jnp.mean(hinge(scores, signs)) + optax.tree.norm(params, squared=True)

    params = {"weight": draw(25, 4), "bias": jnp.float32(0.1)}
    signs = jnp.array([1.0, -1, 1, 1, -1, -1])
    return Problem(loss, params, (draw(26, 6, 4), signs))


@case(CASES)
def optax_unrolled_adam(plant):
    """The learning rate and the start of three steps of Adam are the parameters."""

    @plant
    def bowl(x, centre):
        return jnp.sum(jnp.cosh(x - centre))

    def loss(params, centre):
        optimizer = optax.adam(params["rate"], eps=1e-3)
        x = params["start"]
        state = optimizer.init(x)
        for _ in range(3):
            step, state = optimizer.update(jnp.sinh(x - centre), state)
            x = optax.apply_updates(x, step)
        return bowl(x, centre)

    params = {"start": draw(27, 4), "rate": jnp.float32(0.1)}
    return Problem(loss, params, (draw(28, 4),))
