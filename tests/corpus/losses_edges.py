"""Correct losses that strain the numbers: edges, sizes, dtypes, odd trees, kinks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch

from corpus.case import Case, Problem, case, draw

CASES: list[Case] = []


# Near a domain's edge, and numbers of very different sizes


def torch_log_edge(x):
    return torch.log(x).sum()


@case(CASES, twin=torch_log_edge)
def log_near_zero(plant):
    @plant
    def logs(x):
        return jnp.log(x)

    def loss(x):
        return jnp.sum(logs(x))

    return Problem(loss, jnp.array([1e-6, 0.5, 3e-6, 2.0]))


@case(CASES)
def root_near_zero(plant):
    @plant
    def roots(x):
        return jnp.sqrt(x)

    def loss(params):
        return jnp.sum(roots(params["near"])) + jnp.sum(roots(params["far"]) ** 3)

    params = {"near": jnp.array([1e-8, 4e-8]), "far": jnp.array([1.0, 2.0])}
    return Problem(loss, params)


@case(CASES)
def angle_near_one(plant):
    @plant
    def angle(x):
        return jnp.arccos(x)

    def loss(x):
        return jnp.sum(angle(x)) + jnp.sum(jnp.arctanh(x))

    return Problem(loss, jnp.array([0.99999, -0.9999, 0.3, 1 - 2e-6]))


@case(CASES)
def small_divisor(plant):
    @plant
    def ratio(x, y):
        return x / y

    def loss(params):
        return jnp.sum(jnp.tanh(ratio(params["x"], params["y"])))

    x = jnp.array([1e-5, 2e-5, -3e-6])
    return Problem(loss, {"x": x, "y": jnp.array([2e-5, -1e-5, 1e-5])})


def torch_large_offset(x):
    return 1e4 + 1e-2 * torch.sin(x).sum()


@case(CASES, twin=torch_large_offset)
def large_offset(plant):
    @plant
    def ripple(x):
        return jnp.sin(x)

    def loss(x):
        return 1e4 + 1e-2 * jnp.sum(ripple(x))

    return Problem(loss, draw(52, 8))


@case(CASES, expect={"x": "imprecise"})
def cancelling_variance(plant):
    """The mean of squares less the square of the mean, of numbers near 100,000."""

    @plant
    def variance(x):
        return jnp.mean(x**2) - jnp.mean(x) ** 2

    def loss(params):
        return variance(params["x"]) + params["other"] ** 2

    return Problem(loss, {"x": 1e5 + draw(53, 16), "other": jnp.float32(0.5)})


@case(CASES, expect={"x": "imprecise"})
def cancelling_difference(plant):
    @plant
    def gap(x):
        return jnp.exp(x + 1e-5) - jnp.exp(x)

    def loss(params):
        return jnp.sum(gap(params["x"])) + jnp.sum(params["y"] ** 2)

    return Problem(loss, {"x": draw(54, 5), "y": draw(55, 5)})


@case(CASES)
def tiny_and_huge_leaves(plant):
    @plant
    def blend(tiny, huge):
        return jnp.tanh(tiny * 1e8) * jnp.cos(huge * 1e-8)

    def loss(params):
        return jnp.sum(blend(params["tiny"], params["huge"]) * params["middle"])

    params = {
        "tiny": draw(56, 4, scale=1e-8),
        "huge": draw(57, 4, scale=1e8),
        "middle": draw(58, 4),
    }
    return Problem(loss, params)


@case(CASES)
def mixed_scales_in_one_leaf(plant):
    @plant
    def normal(x, scales):
        return x / scales

    def loss(x, scales):
        return jnp.sum(jnp.sin(normal(x, scales)) * scales)

    scales = jnp.array([1e-6, 1e-3, 1.0, 1e3, 1e6])
    return Problem(loss, draw(59, 5) * scales, (scales,))


@case(CASES)
def tiny_loss(plant):
    @plant
    def squared(x):
        return 1e-12 * x**2

    def loss(params, x):
        return jnp.mean(squared(x @ params["weight"] + params["bias"]))

    return Problem(
        loss, {"weight": draw(60, 3, 3), "bias": draw(61, 3)}, (draw(62, 5, 3),)
    )


@case(CASES)
def one_leaf_dwarfs_another(plant):
    """The gradients of two leaves are 6 orders of magnitude apart."""

    @plant
    def loud(x):
        return 1e3 * jnp.sin(x)

    def loss(params):
        return jnp.sum(loud(params["loud"])) + 1e-3 * jnp.sum(params["quiet"] ** 3)

    return Problem(loss, {"loud": draw(63, 4), "quiet": draw(64, 4)})


# Dtypes


@case(CASES)
def bfloat16_leaves(plant):
    @plant
    def dense(weight, x):
        return jnp.tanh(x @ weight)

    def loss(params, x):
        return jnp.mean((dense(params["weight"], x) + params["bias"]) ** 2)

    params = {"weight": draw(65, 4, 4), "bias": draw(66, 4)}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return Problem(loss, half, (draw(67, 6, 4).astype(jnp.bfloat16),))


@case(CASES)
def float16_leaves(plant):
    @plant
    def softly(x):
        return jax.nn.softplus(x)

    def loss(params):
        return jnp.mean(softly(params["x"]) * params["scale"])

    params = {"x": draw(68, 8), "scale": draw(69, 8)}
    return Problem(loss, jax.tree.map(lambda x: x.astype(jnp.float16), params))


class Mixed(NamedTuple):
    table: jax.Array
    weight: jax.Array
    gain: jax.Array


@case(CASES)
def mixed_dtypes(plant):
    @plant
    def scaled(gain, h):
        return gain * h.astype(gain.dtype)

    def loss(params, tokens, y):
        h = params.table[tokens].astype(params.weight.dtype) @ params.weight
        return jnp.mean((scaled(params.gain, h) - y) ** 2)

    params = Mixed(
        draw(70, 9, 4).astype(jnp.bfloat16),
        draw(71, 4, 4).astype(jnp.float16),
        1 + draw(72, 4, scale=0.1),
    )
    return Problem(loss, params, (jnp.array([1, 5, 5, 0, 8]), draw(73, 5, 4)))


@case(CASES, expect={"in": "imprecise", "out": "imprecise"})
def bfloat16_inside(plant):
    """Mixed precision: float32 parameters, cast to the data's dtype where used."""

    @plant
    def matmul(weight, x):
        return x @ weight.astype(x.dtype)

    def loss(params, x, y):
        h = jax.nn.silu(matmul(params["in"], x))
        return jnp.mean((matmul(params["out"], h).astype(y.dtype) - y) ** 2)

    params = {"in": draw(74, 5, 8), "out": draw(75, 8, 2)}
    return Problem(loss, params, (draw(76, 6, 5).astype(jnp.bfloat16), draw(77, 6, 2)))


def torch_double_well(x):
    return ((x**2 - 1) ** 2).sum() + 0.3 * (x[1:] * x[:-1]).sum()


@case(CASES, x64=True, twin=torch_double_well)
def float64_double_well(plant):
    @plant
    def well(x):
        return (x**2 - 1) ** 2

    def loss(x):
        return jnp.sum(well(x)) + 0.3 * jnp.sum(x[1:] * x[:-1])

    return Problem(loss, draw(78, 6).astype(jnp.float64))


@case(CASES, x64=True)
def float64_beside_float32(plant):
    @plant
    def energy(position, charge):
        charge = charge.astype(position.dtype)
        gaps = jnp.abs(position[:, None] - position) + jnp.eye(len(position))
        return jnp.sum(jnp.triu(charge[:, None] * charge / gaps, 1))

    def loss(params):
        return energy(params["position"], params["charge"])

    params = {"position": draw(79, 5).astype(jnp.float64), "charge": draw(80, 5)}
    return Problem(loss, params)


# What params may hold


@case(CASES)
def one_number(plant):
    @plant
    def wave(x):
        return jnp.sin(x) * jnp.exp(-x)

    def loss(x):
        return wave(x) + x**2

    return Problem(loss, jnp.float32(0.7))


@case(CASES)
def unused_leaf(plant):
    @plant
    def dense(weight, x):
        return x @ weight

    def loss(params, x):
        return jnp.mean(dense(params["used"], x) ** 2) + 0 * jnp.sum(params["times_0"])

    params = {"used": draw(81, 3, 3), "unused": draw(82, 3, 3), "times_0": draw(83, 2)}
    return Problem(loss, params, (draw(84, 5, 3),))


@case(CASES, expect={"steps": "not_differentiable", "mask": "not_differentiable"})
def integers_and_booleans(plant):
    @plant
    def decayed(weight, steps):
        return weight * 0.9**steps

    def loss(params, x):
        kept = jnp.where(params["mask"], decayed(params["w"], params["steps"]), 0)
        return jnp.mean((x @ kept) ** 2)

    params = {
        "w": draw(85, 4, 4),
        "steps": jnp.int32(3),
        "mask": jnp.tril(jnp.ones((4, 4), bool)),
    }
    return Problem(loss, params, (draw(86, 5, 4),))


class Noisy(NamedTuple):
    weight: jax.Array
    key: jax.Array
    raw_key: jax.Array
    rate: float
    activation: object
    name: str
    bias: None = None


@case(CASES)
def keys_and_static_leaves(plant):
    @plant
    def dense(weight, x):
        return x @ weight

    def loss(params, x):
        h = params.activation(dense(params.weight, x))
        keys = params.key, jax.random.wrap_key_data(params.raw_key)
        for key in keys:
            h = h * (1 + params.rate * jax.random.normal(key, h.shape, jnp.float32))
        return jnp.mean(h**2)

    keys = jax.random.key(3), jax.random.key_data(jax.random.key(4))
    params = Noisy(draw(87, 4, 4), *keys, 0.3, jnp.tanh, "noisy")
    return Problem(loss, params, (draw(88, 5, 4),))


@case(CASES)
def numpy_leaves(plant):
    @plant
    def quadratic(matrix, x):
        return x @ matrix @ x

    def loss(params):
        matrix, (x, scale) = params["matrix"], params["rest"]
        return quadratic(matrix, x) * scale

    params = {"matrix": draw(89, 4, 4), "rest": [draw(90, 4), jnp.float32(0.3)]}
    return Problem(loss, jax.tree.map(jax.device_get, params))


# Beside a kink, and on it


@case(CASES)
def beside_kinks(plant):
    @plant
    def bent(x):
        return jax.nn.relu(x) + jnp.abs(x - 1)

    def loss(params):
        return jnp.sum(jnp.clip(bent(params["x"]) * params["scale"], -1, 3))

    x = jnp.array([1e-3, -1e-3, 1.0005, 0.9995, 0.5])
    return Problem(loss, {"x": x, "scale": 1 + draw(91, 5, scale=0.1)})


@case(CASES, expect={"x": "kink"})
def relu_at_zero(plant):
    @plant
    def squared(x):
        return x**2

    def loss(params, weights):
        return jax.nn.relu(params["x"]) @ weights + jnp.sum(squared(params["other"]))

    params = {"x": jnp.array([0.0, 0.5, -0.5, 0.0]), "other": draw(92, 3)}
    return Problem(loss, params, (jnp.array([1.0, 2.0, 3.0, 4.0]),))


@case(CASES, expect={"bias": "kink"})
def relu_of_an_empty_row(plant):
    """A padded row of zeros and biases that start at zero: relu is exactly at 0."""

    @plant
    def affine(weight, bias, x):
        return x @ weight + bias

    def loss(params, x, y):
        h = jax.nn.relu(affine(params["weight"], params["bias"], x))
        return jnp.mean((h @ params["head"] - y) ** 2)

    params = {"weight": draw(93, 3, 6), "bias": jnp.zeros(6), "head": draw(94, 6)}
    return Problem(loss, params, (draw(95, 5, 3).at[2].set(0), draw(96, 5)))


@case(CASES, expect={"weight": "kink"})
def sparse_penalty(plant):
    @plant
    def affine(bias, weight, x):
        return x @ weight + bias

    def loss(params, x, y):
        fit = jnp.mean((affine(params["bias"], params["weight"], x) - y) ** 2)
        return fit + 0.1 * jnp.sum(jnp.abs(params["weight"]))

    weight = jnp.array([0.0, 1.0, 0.0, -0.5])
    params = {"weight": weight, "bias": jnp.float32(0.1)}
    return Problem(loss, params, (draw(97, 6, 4), draw(98, 6)))


@case(CASES, expect={"x": "kink"})
def tied_maximum(plant):
    @plant
    def wave(y):
        return jnp.sin(y)

    def loss(params):
        return jnp.max(params["x"]) ** 2 + jnp.sum(wave(params["y"]))

    return Problem(loss, {"x": jnp.array([2.0, 1.0, 2.0, 0.5]), "y": draw(99, 4)})
