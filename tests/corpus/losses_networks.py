"""Correct losses of neural networks: dense, convolutional, attention, recurrent."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as tf
from jax import lax

from corpus.case import Case, Problem, case, draw, labels

CASES: list[Case] = []


def dense_layers(seed, *sizes):
    return [
        (draw(seed + i, n, m, scale=n**-0.5), draw(seed + 50 + i, m, scale=0.1))
        for i, (n, m) in enumerate(pairwise(sizes))
    ]


def torch_dense(activation):
    def twin(w1, b1, w2, b2, x, y):
        return ((activation(x @ w1 + b1) @ w2 + b2 - y) ** 2).mean()

    return twin


@case(CASES, twin=torch_dense(torch.tanh))
def dense_tanh(plant):
    @plant
    def affine(weight, bias, x):
        return x @ weight + bias

    def loss(params, x, y):
        (w1, b1), (w2, b2) = params
        return jnp.mean((affine(w2, b2, jnp.tanh(affine(w1, b1, x))) - y) ** 2)

    return Problem(loss, dense_layers(0, 5, 8, 3), (draw(1, 6, 5), draw(2, 6, 3)))


@case(CASES, twin=torch_dense(torch.relu))
def wide_relu(plant):
    @plant
    def affine(weight, bias, x):
        return x @ weight + bias

    def loss(params, x, y):
        (w1, b1), (w2, b2) = params
        return jnp.mean((jax.nn.relu(affine(w1, b1, x)) @ w2 + b2 - y) ** 2)

    return Problem(loss, dense_layers(3, 12, 300, 1), (draw(4, 32, 12), draw(5, 32, 1)))


@case(CASES)
def wide_max_pool(plant):
    @plant
    def pool(h, groups):
        return jnp.max(h.reshape(len(h), len(groups), -1), axis=-1) * groups

    def loss(params, x, y):
        (w1, b1), (w2, b2) = params["layers"]
        h = pool(x @ w1 + b1, params["scale"])
        return jnp.mean((h @ w2 + b2 - y) ** 2)

    params = {
        "layers": [dense_layers(6, 10, 256)[0], dense_layers(7, 64, 1)[0]],
        "scale": 1 + draw(8, 64, scale=0.1),
    }
    return Problem(loss, params, (draw(9, 16, 10), draw(10, 16, 1)))


def torch_softmax(weight, bias, x, y):
    return tf.cross_entropy(x @ weight + bias, y)


@case(CASES, twin=torch_softmax)
def softmax_classifier(plant):
    @plant
    def cross_entropy(logits, y):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        return -jnp.mean(chosen)

    def loss(params, x, y):
        weight, bias = params
        return cross_entropy(x @ weight + bias, y)

    return Problem(loss, dense_layers(11, 6, 4)[0], (draw(12, 10, 6), labels(0, 10, 4)))


class Conv(NamedTuple):
    kernel: jax.Array
    bias: jax.Array
    head: jax.Array


def torch_conv(kernel, bias, head, x, y):
    h = tf.softplus(tf.conv2d(x, kernel, bias, padding=1)).mean((2, 3))
    return ((h @ head - y) ** 2).mean()


@case(CASES, twin=torch_conv)
def conv_2d(plant):
    @plant
    def convolve(kernel, bias, x):
        return lax.conv(x, kernel, (1, 1), "SAME") + bias[:, None, None]

    def loss(params, x, y):
        h = jax.nn.softplus(convolve(params.kernel, params.bias, x)).mean((2, 3))
        return jnp.mean((h @ params.head - y) ** 2)

    params = Conv(draw(13, 4, 2, 3, 3, scale=0.3), draw(14, 4), draw(15, 4, 1))
    return Problem(loss, params, (draw(16, 3, 2, 6, 6), draw(17, 3, 1)))


def torch_conv_strided(kernel, x):
    return torch.tanh(tf.conv1d(x, kernel, stride=2, dilation=2)).square().sum()


@case(CASES, twin=torch_conv_strided)
def conv_1d_strided_dilated(plant):
    @plant
    def convolve(kernel, x):
        return lax.conv_general_dilated(x, kernel, (2,), "VALID", rhs_dilation=(2,))

    def loss(kernel, x):
        return jnp.sum(jnp.tanh(convolve(kernel, x)) ** 2)

    return Problem(loss, draw(18, 3, 2, 3, scale=0.4), (draw(19, 4, 2, 12),))


@case(CASES)
def conv_transposed_and_grouped(plant):
    @plant
    def decode(kernel, grouped, z):
        up = lax.conv_transpose(z, kernel, (2, 2), "SAME")
        return lax.conv_general_dilated(
            up,
            grouped,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    def loss(params, z, image):
        return jnp.mean((jax.nn.sigmoid(decode(*params, z)) - image) ** 2)

    params = (draw(20, 3, 3, 2, 4, scale=0.4), draw(21, 3, 3, 2, 4, scale=0.4))
    return Problem(loss, params, (draw(22, 2, 3, 3, 2), draw(23, 2, 6, 6, 4)))


def torch_max_pool(kernel, x):
    return tf.max_pool2d(tf.conv2d(x, kernel), 2).square().mean()


@case(CASES, twin=torch_max_pool)
def max_pool_reduce_window(plant):
    @plant
    def pool(h):
        window = (1, 1, 2, 2)
        return lax.reduce_window(h, -jnp.inf, lax.max, window, window, "VALID")

    def loss(kernel, x):
        return jnp.mean(pool(lax.conv(x, kernel, (1, 1), "VALID")) ** 2)

    return Problem(loss, draw(24, 3, 1, 3, 3), (draw(25, 2, 1, 8, 8),))


@case(CASES)
def average_pool_reduce_window(plant):
    @plant
    def pool(h):
        total = lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 2), "SAME")
        return total / 3

    def loss(weight, x):
        return jnp.sum(jnp.tanh(pool(x @ weight)) ** 2)

    return Problem(loss, draw(26, 4, 9), (draw(27, 5, 4),))


def torch_attention(key, out, query, value, x):
    q, k, v = ((x @ w).reshape(5, 2, 4).transpose(0, 1) for w in (query, key, value))
    h = tf.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (h.transpose(0, 1).reshape(5, 8) @ out).square().mean()


@case(CASES, twin=torch_attention)
def causal_attention(plant):
    @plant
    def attend(q, k, v):
        scores = jnp.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[1:])), scores, -jnp.inf)
        return jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores), v)

    def loss(params, x):
        q, k, v = ((x @ params[n]).reshape(5, 2, 4) for n in ("query", "key", "value"))
        return jnp.mean((attend(q, k, v).reshape(5, 8) @ params["out"]) ** 2)

    names = ("query", "key", "value", "out")
    params = {name: draw(28 + i, 8, 8, scale=0.4) for i, name in enumerate(names)}
    return Problem(loss, params, (draw(32, 5, 8),))


def torch_recurrent(inner, outer, readout, xs, y):
    h = torch.zeros(4, dtype=xs.dtype)
    for x in xs:
        h = torch.tanh(inner @ h + outer @ x)
    return (readout @ h - y) ** 2


@case(CASES, twin=torch_recurrent)
def recurrent_scan(plant):
    @plant
    def cell(inner, outer, h, x):
        return jnp.tanh(inner @ h + outer @ x)

    def loss(params, xs, y):
        inner, outer, readout = params
        start = jnp.zeros_like(readout)
        h, _ = lax.scan(lambda h, x: (cell(inner, outer, h, x), None), start, xs)
        return (readout @ h - y) ** 2

    params = (draw(33, 4, 4, scale=0.5), draw(34, 4, 3), draw(35, 4))
    return Problem(loss, params, (draw(36, 7, 3), jnp.float32(0.7)))


@case(CASES)
def lstm_scan(plant):
    @plant
    def cell(weight, bias, state, x):
        h, c = state
        i, f, g, o = jnp.split(weight @ jnp.concatenate([x, h]) + bias, 4)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def loss(params, xs):
        def step(state, x):
            state = cell(params["weight"], params["bias"], state, x)
            return state, state[0]

        zero = jnp.zeros_like(params["bias"][:3])
        _, hs = lax.scan(step, (zero, zero), xs)
        return jnp.mean(hs**2)

    params = {"weight": draw(37, 12, 5, scale=0.5), "bias": draw(38, 12, scale=0.1)}
    return Problem(loss, params, (draw(39, 6, 2),))


def torch_layer_norm(weight, gain, shift, x, y):
    h = tf.layer_norm(x @ weight, (6,), gain, shift)
    return (tf.gelu(h, approximate="tanh") - y).square().mean()


@case(CASES, twin=torch_layer_norm)
def layer_norm_gelu(plant):
    @plant
    def normalize(h, gain, shift):
        mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        return (h - mean) * lax.rsqrt(var + 1e-5) * gain + shift

    def loss(params, x, y):
        weight, gain, shift = params
        return jnp.mean((jax.nn.gelu(normalize(x @ weight, gain, shift)) - y) ** 2)

    params = (draw(40, 4, 6), 1 + draw(41, 6, scale=0.1), draw(42, 6, scale=0.1))
    return Problem(loss, params, (draw(43, 8, 4), draw(44, 8, 6)))


@case(CASES)
def batch_norm(plant):
    @plant
    def normalize(h, gain):
        return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) * gain

    def loss(params, x, y):
        h = jax.nn.silu(normalize(x @ params["weight"], params["gain"]))
        return jnp.mean((h @ params["head"] - y) ** 2)

    params = {"weight": draw(45, 4, 6), "gain": 1 + draw(46, 6), "head": draw(47, 6)}
    return Problem(loss, params, (draw(48, 12, 4), draw(49, 12)))


@case(CASES)
def residual_remat_scan(plant):
    @plant
    def block(weight, bias, h):
        return h + jnp.tanh(h @ weight + bias)

    def loss(params, x):
        @jax.checkpoint
        def step(h, layer):
            return block(*layer, h), None

        h, _ = lax.scan(step, x, params)
        return jnp.mean(h**2)

    params = (draw(50, 3, 5, 5, scale=0.3), draw(51, 3, 5, scale=0.1))
    return Problem(loss, params, (draw(52, 4, 5),))


@case(CASES)
def remat_saving_dots_only(plant):
    @plant
    def dense(weight, h):
        return jnp.sin(h @ weight)

    def loss(weights, x):
        policy = jax.checkpoint_policies.dots_saveable
        inside = jax.checkpoint(lambda w, h: dense(w[1], dense(w[0], h)), policy=policy)
        return jnp.mean(inside(weights, x) ** 2)

    return Problem(loss, (draw(53, 3, 3), draw(54, 3, 3)), (draw(55, 5, 3),))


def torch_embedding(head, table, tokens, y):
    return tf.cross_entropy(table[tokens].mean(1) @ head, y)


@case(CASES, twin=torch_embedding)
def embedding_with_unused_rows(plant):
    @plant
    def pooled(table, tokens):
        return table[tokens].mean(1)

    def loss(params, tokens, y):
        logits = pooled(params["table"], tokens) @ params["head"]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    tokens = jnp.array([[0, 3, 3], [7, 0, 9], [12, 7, 1], [3, 9, 9]])
    params = {"table": draw(56, 20, 4), "head": draw(57, 4, 3)}
    return Problem(loss, params, (tokens, labels(1, 4, 3)))


@case(CASES)
def mixture_of_experts_top_two(plant):
    @plant
    def route(logits):
        values, chosen = lax.top_k(logits, 2)
        return jax.nn.softmax(values), chosen

    def loss(params, x, y):
        weights, chosen = route(x @ params["gate"])
        outputs = jnp.einsum("nd,edk->nek", x, params["experts"])
        picked = jnp.take_along_axis(outputs, chosen[:, :, None], 1)
        return jnp.mean((jnp.einsum("ne,nek->nk", weights, picked) - y) ** 2)

    params = {"gate": draw(58, 4, 5), "experts": draw(59, 5, 4, 3, scale=0.5)}
    return Problem(loss, params, (draw(60, 8, 4), draw(61, 8, 3)))


@case(CASES)
def graph_convolution(plant):
    @plant
    def gather_neighbours(h, source, target):
        return jax.ops.segment_sum(h[source], target, num_segments=len(h))

    def loss(params, x, source, target, y):
        for weight in params:
            x = jnp.tanh(gather_neighbours(x @ weight, source, target) + x @ weight)
        return jnp.mean((x - y) ** 2)

    edges = jnp.array([0, 1, 2, 3, 4, 1, 3]), jnp.array([1, 2, 3, 4, 0, 4, 1])
    params = [draw(105, 3, 3), draw(106, 3, 3)]
    return Problem(loss, params, (draw(107, 5, 3), *edges, draw(108, 5, 3)))


@case(CASES)
def jitted_sub_functions(plant):
    @plant
    def dense(weight, x):
        return jax.nn.elu(x @ weight)

    @jax.jit
    def two_layers(weights, x):
        return jax.jit(dense)(weights[1], jax.jit(dense, inline=True)(weights[0], x))

    def loss(weights, x):
        return jnp.mean(two_layers(weights, x) ** 2)

    return Problem(loss, [draw(109, 4, 4), draw(110, 4, 4)], (draw(111, 5, 4),))


@case(CASES)
def nested_vmap(plant):
    @plant
    def bilinear(matrix, a, b):
        return jnp.tanh(a @ matrix @ b)

    def loss(matrices, xs, ys):
        over_pairs = jax.vmap(bilinear, in_axes=(None, 0, 0))
        return jnp.mean(jax.vmap(over_pairs, in_axes=(0, None, None))(matrices, xs, ys))

    args = (draw(113, 6, 4), draw(114, 6, 4))
    return Problem(loss, draw(112, 3, 4, 4, scale=0.5), args)


@case(CASES)
def sequence_map(plant):
    @plant
    def score(weight, x):
        return jnp.sum(jax.nn.log_sigmoid(weight * x))

    def loss(weight, xs):
        return -jnp.mean(lax.map(lambda x: score(weight, x), xs))

    return Problem(loss, draw(126, 5), (draw(127, 6, 5),))


@case(CASES)
def associative_scan_memory(plant):
    """A linear state space layer, its recurrence run in parallel."""

    @plant
    def recurrence(decay, inputs):
        def join(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        decays = jnp.broadcast_to(decay, inputs.shape)
        return lax.associative_scan(join, (decays, inputs))[1]

    def loss(params, xs, y):
        h = recurrence(jax.nn.sigmoid(params["decay"]), xs @ params["into"])
        return jnp.mean((h @ params["out"] - y) ** 2)

    params = {"decay": draw(128, 4), "into": draw(129, 2, 4), "out": draw(130, 4)}
    return Problem(loss, params, (draw(131, 9, 2), draw(132, 9)))
