"""Healthy losses in plain JAX that look like trouble, and must not be accused."""

import jax
import jax.numpy as jnp
import numpy as np
from corpus.case import draw
from jax import lax
from jax.scipy.special import entr, rel_entr, xlogy

from faults.case import Healthy, Problem, healthy

CASES: list[Healthy] = []


# Infinities that mask


@healthy(CASES)
def causal_attention():
    def loss(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        allowed = jnp.tril(jnp.ones((4, 4), bool))
        scores = q @ k.T / jnp.sqrt(3.0)
        scores = jnp.where(allowed, scores, -jnp.inf)  # infinite
        return jnp.sum((jax.nn.softmax(scores, -1) @ v) ** 2)

    params = {name: draw(seed, 3, 3) for seed, name in enumerate("qkv")}
    return Problem(loss, params, (draw(3, 4, 3),))


@healthy(CASES)
def softmax_with_a_mask_in_the_data():
    def loss(w, x, mask):
        scores = x @ w + mask
        return jnp.sum(jax.nn.softmax(scores, -1)[:, 0] ** 2)

    mask = jnp.where(jnp.array([[1, 1, 0], [1, 0, 1]]) > 0, 0.0, -jnp.inf)
    return Problem(loss, draw(4, 2, 3), (draw(5, 2, 2), mask))


@healthy(CASES)
def softmax_by_hand_with_a_mask():
    def loss(w, x, mask):
        scores = jnp.where(mask, x @ w, -jnp.inf)
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        e = jnp.exp(scores - top)
        p = e / e.sum(-1, keepdims=True)
        return jnp.sum(p**2)

    mask = jnp.array([[True, True, False], [True, False, True]])
    return Problem(loss, draw(6, 2, 3), (draw(7, 2, 2), mask))


@healthy(CASES)
def logsumexp_of_some():
    def loss(w, keep):
        scores = jnp.where(keep, w, -jnp.inf)
        return jax.nn.logsumexp(scores)

    keep = jnp.array([True, False, True, True])
    return Problem(loss, draw(8, 4), (keep,))


@healthy(CASES)
def online_softmax():
    """The running maximum starts at minus infinity, as in flash attention."""

    def loss(params, keys, values):
        scores = keys @ params["query"]

        def step(state, pair):
            top, total, weighted = state
            score, value = pair
            new = jnp.maximum(top, score)
            shrink = jnp.exp(top - new)
            grown = jnp.exp(score - new)
            total = total * shrink + grown
            weighted = weighted * shrink + grown * value
            return (new, total, weighted), None

        start = jnp.float32(-jnp.inf), jnp.float32(0.0), jnp.float32(0.0)
        (_, total, weighted), _ = lax.scan(step, start, (scores, values))
        return (weighted / total - params["goal"]) ** 2

    params = {"goal": jnp.float32(0.1), "query": draw(9, 3)}
    return Problem(loss, params, (draw(10, 5, 3), draw(11, 5)))


@healthy(CASES)
def hidden_markov_model():
    """Forbidden transitions have a log-probability of minus infinity."""

    def loss(params, forbidden, observations):
        scores = jnp.where(forbidden, -jnp.inf, params["transition"])
        transition = jax.nn.log_softmax(scores, -1)
        emission = jax.nn.log_softmax(params["emission"], -1)

        def step(alpha, seen):
            moved = jax.nn.logsumexp(alpha[:, None] + transition, axis=0)
            return moved + emission[:, seen], None

        start = jnp.zeros(2)
        alpha, _ = lax.scan(step, start, observations)
        return -jax.nn.logsumexp(alpha)

    params = {"transition": draw(12, 2, 2), "emission": draw(13, 2, 3)}
    forbidden = jnp.array([[False, False], [True, False]])
    return Problem(loss, params, (forbidden, jnp.array([0, 2, 1, 1])))


@healthy(CASES)
def maximum_of_empty_segments():
    """A node without neighbours has a maximum of minus infinity, masked away."""

    def loss(w, x, nodes):
        h = x @ w
        tops = jax.ops.segment_max(h, nodes, num_segments=3)  # infinite
        tops = jnp.where(jnp.isfinite(tops), tops, 0.0)
        return jnp.sum(tops**2)

    return Problem(loss, draw(14, 2), (draw(15, 4, 2), jnp.array([0, 0, 2, 2])))


@healthy(CASES)
def infinite_mask_that_is_unused():
    def loss(w, batch):
        return jnp.sum((batch["x"] @ w) ** 2)

    batch = {"x": draw(16, 3, 2), "mask": jnp.full((3, 3), -jnp.inf)}
    return Problem(loss, draw(17, 2), (batch,))


@healthy(CASES)
def bounds_at_infinity():
    def loss(w, low, high):
        bounded = jnp.clip(w, low, high)
        return jnp.sum(bounded**2) + jnp.max(w, initial=-jnp.inf, where=w > -5.0)

    low, high = jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf)
    return Problem(loss, draw(18, 3), (low, high))


@healthy(CASES)
def max_pooling_with_padding():
    def loss(kernel, image):
        h = jnp.convolve(image, kernel, mode="same")
        pooled = lax.reduce_window(h, -jnp.inf, lax.max, (3,), (2,), "SAME")
        return jnp.sum(pooled**2)

    return Problem(loss, draw(19, 3), (draw(20, 7),))


# Made safe before the operation


@healthy(CASES)
def double_where():
    def loss(w, x):
        h = x * w
        safe = jnp.where(h > 0, h, 1.0)
        return jnp.sum(jnp.where(h > 0, jnp.sqrt(safe), 0.0))

    return Problem(loss, jnp.float32(2.0), (jnp.array([1.0, 0.0, -3.0]),))


@healthy(CASES)
def double_where_of_a_norm():
    def loss(points):
        between = points[:, None] - points[None]
        square = jnp.sum(between**2, -1)
        same = square == 0
        distance = jnp.sqrt(jnp.where(same, 1.0, square))
        return jnp.sum(jnp.where(same, 0.0, distance))

    return Problem(loss, draw(21, 3, 2))


@healthy(CASES)
def norm_with_epsilon():
    def loss(params):
        square = jnp.sum(params["b"] ** 2)
        return jnp.sqrt(square + 1e-12) + jnp.linalg.norm(params["w"] + 1e-3)

    return Problem(loss, {"b": jnp.array([0.0, 0.5]), "w": jnp.zeros(3)})


@healthy(CASES)
def root_of_a_relu():
    """relu drops the infinite cotangent by selecting, not by multiplying."""

    def loss(w, x):
        return jnp.sum(jnp.sqrt(jax.nn.relu(x * w)))

    return Problem(loss, jnp.float32(1.5), (jnp.array([-1.0, 4.0, -0.5]),))


@healthy(CASES)
def cleaned_data():
    def loss(w, x):
        x = jnp.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0)
        return jnp.mean((x @ w - 1) ** 2)

    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0], [0.5, -jnp.inf]])
    return Problem(loss, draw(22, 2), (x,))


@healthy(CASES)
def root_of_data_that_is_zero():
    """Its slope is infinite, and nobody asks for it."""

    def loss(w, x):
        features = jnp.sqrt(x)
        return jnp.sum((features * w - 1) ** 2)

    return Problem(loss, draw(23, 3), (jnp.array([0.0, 1.0, 4.0]),))


@healthy(CASES)
def root_that_is_held():
    def loss(w):
        scale = lax.stop_gradient(jnp.sqrt(w[0] * 0.0))
        return jnp.sum(w**2) + scale

    return Problem(loss, draw(24, 3))


@healthy(CASES)
def clipped_step():
    """A zero norm gives an infinite ratio, and the minimum takes 1."""

    def loss(w, direction):
        ratio = 1.0 / jnp.linalg.norm(direction)  # infinite
        scale = jnp.minimum(1.0, ratio)
        return jnp.sum((w - scale * direction) ** 2)

    return Problem(loss, draw(25, 3), (jnp.zeros(3),))


@healthy(CASES)
def entropies_at_zero():
    def loss(params, p):
        q = jax.nn.softmax(params["logits"])
        return jnp.sum(xlogy(p, q) + rel_entr(p, q)) + jnp.sum(entr(p)) * q[0]

    p = jnp.array([0.0, 0.4, 0.6])
    return Problem(loss, {"logits": draw(26, 3)}, (p,))


@healthy(CASES)
def log_softmax_of_large_logits():
    def loss(logits, y):
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], 1))

    logits = jnp.array([[1000.0, 0.0], [0.5, 0.2]])
    return Problem(loss, logits, (jnp.array([1, 0]),))


# Kinks, choices and gradients that are partly zero


@healthy(CASES, dead={"w": (1,)})
def relu_at_zero():
    def loss(params):
        return jnp.sum(jax.nn.relu(params["w"]) * 2)

    return Problem(loss, {"w": jnp.array([1.0, 0.0, 3.0])})


@healthy(CASES)
def absolute_value_at_zero():
    """JAX says 1 there."""

    def loss(w):
        return jnp.sum(jnp.abs(w))

    return Problem(loss, jnp.array([0.0, -1.0, 2.0]))


@healthy(CASES, dead={"table": (1, 3)})
def rows_of_an_embedding():
    def loss(params, tokens):
        return jnp.sum((params["table"][tokens] @ params["w"]) ** 2)

    params = {"table": draw(27, 5, 2), "w": draw(28, 2)}
    return Problem(loss, params, (jnp.array([0, 2, 4, 2]),))


@healthy(CASES, dead={"bias": (2,)})
def one_dead_unit():
    def loss(params, x):
        h = jax.nn.relu(x @ params["weight"] + params["bias"])
        return jnp.sum((h.sum(1) - 1) ** 2)

    params = {"weight": jnp.abs(draw(29, 2, 3)), "bias": jnp.array([1.0, 2.0, -40.0])}
    return Problem(loss, params, (jnp.abs(draw(30, 4, 2)),))


@healthy(CASES)
def top_two():
    def loss(w, x):
        best, _ = lax.top_k(x @ w, 2)
        return jnp.sum(best**2)

    return Problem(loss, draw(31, 3), (draw(32, 5, 3),))


@healthy(CASES)
def straight_through():
    def loss(params, x):
        h = jnp.tanh(x @ params["w"])
        codes = h + lax.stop_gradient(jnp.round(h) - h)
        return jnp.mean((codes @ params["out"] - 1) ** 2)

    params = {"w": draw(33, 3, 2), "out": draw(34, 2)}
    return Problem(loss, params, (draw(35, 4, 3),))


@healthy(CASES)
def chosen_and_returned():
    """argmax, comparisons and counts beside a loss that doesn't use them."""

    def loss(w, x, y):
        logits = x @ w
        losses = jax.nn.logsumexp(logits, -1) - logits[jnp.arange(len(y)), y]
        accuracy = jnp.mean((jnp.argmax(logits, -1) == y).astype(jnp.float32))
        return losses.mean(), {"accuracy": accuracy}

    args = (draw(36, 4, 2), jnp.array([0, 2, 1, 2]))
    return Problem(loss, draw(37, 2, 3), args, has_aux=True)


@healthy(CASES)
def eigenvalues_apart():
    def loss(params):
        a = jnp.diag(jnp.array([1.0, 2.0, 4.0])) + 0.1 * (params + params.T)
        values, vectors = jnp.linalg.eigh(a)
        return jnp.sum(values**2) + jnp.sum(vectors[:, -1] ** 3)

    return Problem(loss, draw(38, 3, 3))


@healthy(CASES)
def equal_eigenvalues_summed():
    """Values alone, and all alike: the slope of their sum is finite."""

    def loss(w):
        return jnp.sum(jnp.linalg.eigvalsh(w) ** 2)

    return Problem(loss, 2 * jnp.eye(3))


@healthy(CASES)
def nearest_of_an_infinite_start():
    def loss(w, points):
        def step(best, point):
            distance = jnp.sum((point - w) ** 2)
            return jnp.minimum(best, distance), None

        best, _ = lax.scan(step, jnp.float32(np.inf), points)
        return best

    return Problem(loss, draw(39, 2), (draw(40, 4, 2),))


@healthy(CASES)
def small_and_large():
    """Far from the limits of float32, but only just."""

    def loss(params):
        small = jnp.exp(-80.0 * params["a"]) * 1e30
        large = jnp.exp(80.0 * params["b"]) * 1e-30
        return jnp.log(small + large)

    return Problem(loss, {"a": jnp.float32(1.0), "b": jnp.float32(1.0)})
