"""Healthy models and losses of Equinox, Flax and optax that look like trouble."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus.case import draw
from flax import nnx
from jax import lax

from faults.case import Healthy, Problem, healthy

CASES: list[Healthy] = []


@healthy(CASES)
def equinox_attention_fully_masked():
    """Equinox masks with the lowest finite number, so an empty row is uniform."""

    def loss(layer, x, mask):
        return jnp.sum(layer(x, x, x, mask) ** 2)

    layer = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))
    mask = jnp.array([[True, False, False], [False] * 3, [True] * 3])
    return Problem(loss, layer, (draw(0, 3, 4), mask))


@healthy(CASES)
def equinox_lstm():
    class Net(eqx.Module):
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __call__(self, xs):
            start = jnp.zeros(4), jnp.zeros(4)
            (h, _), _ = lax.scan(lambda s, x: (self.cell(x, s), None), start, xs)
            return self.head(h)

    def loss(model, xs, y):
        return jnp.mean((jax.vmap(model)(xs) - y) ** 2)

    one, two = jax.random.split(jax.random.key(1))
    model = Net(eqx.nn.LSTMCell(2, 4, key=one), eqx.nn.Linear(4, 1, key=two))
    return Problem(loss, model, (draw(1, 3, 5, 2), draw(2, 3, 1)))


@healthy(CASES)
def equinox_norms_of_constant_rows():
    class Net(eqx.Module):
        layer: eqx.nn.LayerNorm
        rms: eqx.nn.RMSNorm

        def __call__(self, x):
            return self.rms(self.layer(x) + x)

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    model = Net(eqx.nn.LayerNorm(3), eqx.nn.RMSNorm(3))
    x = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 4.0]])
    return Problem(loss, model, (x, draw(3, 3, 3)))


@healthy(CASES, dead={"embedding.weight": (0, 4)})
def equinox_embedding():
    class Tagger(eqx.Module):
        embedding: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __call__(self, token):
            return self.head(self.embedding(token))

    def loss(model, tokens, labels):
        logits = jax.vmap(model)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    one, two = jax.random.split(jax.random.key(2))
    model = Tagger(eqx.nn.Embedding(5, 3, key=one), eqx.nn.Linear(3, 2, key=two))
    return Problem(loss, model, (jnp.array([1, 2, 3, 2]), jnp.array([0, 1, 1, 0])))


@healthy(CASES)
def equinox_max_pool():
    class Net(eqx.Module):
        conv: eqx.nn.Conv1d
        pool: eqx.nn.MaxPool1d

        def __call__(self, x):
            return self.pool(jax.nn.relu(self.conv(x)))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    conv = eqx.nn.Conv1d(1, 2, 3, key=jax.random.key(3))
    model = Net(conv, eqx.nn.MaxPool1d(3, 2, padding=1))
    return Problem(loss, model, (draw(4, 3, 1, 8),))


@healthy(CASES)
def linen_causal_transformer():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(5, 4)(tokens)
            mask = linen.make_causal_mask(tokens)
            h = linen.LayerNorm()(x)
            x = x + linen.MultiHeadDotProductAttention(2, use_bias=False)(h, mask=mask)
            x = x + linen.Dense(4)(linen.gelu(linen.Dense(8)(linen.LayerNorm()(x))))
            return linen.Dense(5)(x)

    model, tokens = Block(), jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])

    def loss(variables, tokens):
        logits = model.apply(variables, tokens)[:, :-1]
        labels = tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Problem(loss, jax.jit(model.init)(jax.random.key(4), tokens), (tokens,))


@healthy(CASES)
def linen_attention_bias():
    """Minus infinity as a bias, with something left in each row."""

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, bias):
            q, k, v = (linen.DenseGeneral((1, 4), use_bias=False)(x) for _ in range(3))
            return linen.dot_product_attention(q, k, v, bias=bias)

    model, x = Layer(), draw(5, 1, 3, 3)
    bias = jnp.where(jnp.tril(jnp.ones((3, 3))) > 0, 0.0, -jnp.inf)[None, None]
    variables = model.init(jax.random.key(5), x, bias)

    def loss(variables, x, bias):
        return jnp.mean(model.apply(variables, x, bias) ** 2)

    return Problem(loss, variables, (x, bias))


@healthy(CASES)
def linen_weight_norm_with_dropout():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.WeightNorm(linen.Dense(4))(x)
            h = linen.Dropout(0.3, deterministic=False)(jnp.tanh(h))
            return linen.Dense(1)(h)

    model, x = Net(), draw(6, 5, 3)
    one, two = jax.random.split(jax.random.key(6))
    variables = model.init({"params": one, "dropout": two}, x)

    def loss(variables, x, key):
        return jnp.mean(model.apply(variables, x, rngs={"dropout": key}) ** 2)

    return Problem(loss, variables, (x, two))


@healthy(CASES)
def nnx_batch_norm_and_dropout():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(np.float32(0.25), rngs=rngs)
            self.outer = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.norm(self.inner(x)))
            return self.outer(self.dropout(h))

    graph, params, rest = nnx.split(Net(nnx.Rngs(7)), nnx.Param, ...)

    def loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean((model(x) - y) ** 2)

    return Problem(loss, params, (rest, draw(7, 6, 3), draw(8, 6, 1)))


@healthy(CASES)
def nnx_masked_policy():
    """Actions that aren't allowed have a logit of minus infinity."""

    class Policy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, state, allowed):
            return jnp.where(allowed, self.linear(state), -jnp.inf)

    graph, params = nnx.split(Policy(nnx.Rngs(8)), nnx.Param)

    def loss(params, state, allowed, action, advantage):
        logits = nnx.merge(graph, params)(state, allowed)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)
        return -jnp.mean(log_p[:, 0] * advantage)

    allowed = jnp.array([[True, True, False], [True, False, True]])
    args = (draw(9, 2, 2), allowed, jnp.array([1, 0]), jnp.array([1.0, -0.5]))
    return Problem(loss, params, args)


@healthy(CASES)
def optax_losses_at_their_edges():
    def loss(params, x, y):
        z = x @ params["w"]
        hard = jax.nn.one_hot(y, 3)
        return jnp.mean(
            optax.softmax_cross_entropy(z * 50, hard)
            + optax.kl_divergence(jax.nn.log_softmax(z), hard)
            + optax.sigmoid_binary_cross_entropy(z * 100, hard).sum(-1)
            + optax.huber_loss(z, lax.stop_gradient(z) - 1).sum(-1)
        )

    return Problem(
        loss, {"w": draw(10, 2, 3)}, (draw(11, 4, 2), jnp.array([0, 1, 2, 1]))
    )


@healthy(CASES, dead={"params": (1,)})
def optax_safe_norms():
    def loss(table, x):
        lengths = optax.safe_norm(table * x[:, None], 1e-6, axis=-1)
        return jnp.sum(lengths)

    return Problem(loss, draw(12, 3, 2), (jnp.array([1.0, 0.0, 2.0]),))


@healthy(CASES)
def optax_ctc():
    """Its blank alignments start at a very low log-probability."""

    def loss(weight, x, labels):
        logits = x @ weight
        padding = jnp.zeros(logits.shape[:2])
        return optax.ctc_loss(logits, padding, labels, jnp.zeros(labels.shape)).mean()

    labels = jnp.array([[1, 2], [2, 2]])
    return Problem(loss, draw(13, 2, 3), (draw(14, 2, 6, 2), labels))


@healthy(CASES)
def optax_adam_with_a_safe_root():
    def loss(start, x, y):
        optimizer = optax.adam(0.1, eps_root=1e-8)

        def inner_loss(w):
            return optax.l2_loss(x @ w, y).mean() + 0.01 * jnp.sum(w**2)

        gradient = jax.grad(inner_loss)(start)
        updates, _ = optimizer.update(gradient, optimizer.init(start))
        return inner_loss(optax.apply_updates(start, updates))

    x = draw(15, 4, 3).at[:, 2].set(0.0)
    return Problem(loss, draw(16, 3).at[2].set(0.0), (x, draw(17, 4)))
