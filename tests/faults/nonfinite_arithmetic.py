"""Arithmetic that is infinite or NaN: traps of `where`, logs, divisions."""

import jax
import jax.numpy as jnp
from corpus.case import draw
from jax import lax
from jax.scipy.special import digamma, gammaln

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


# `where` drops the bad value, and keeps its gradient


@nonfinite(CASES, "infinite slope", phase="backward", index=(1,))
def where_sqrt_at_zero():
    def loss(w):
        roots = jnp.where(w > 0, jnp.sqrt(w), 0.0)  # blame
        return jnp.sum(roots**2)

    return Problem(loss, jnp.array([1.0, 0.0, 4.0]))


@nonfinite(CASES, "domain", phase="forward", index=(2,))
def where_sqrt_of_negative():
    def loss(params, x):
        h = x * params["scale"]
        root = jnp.sqrt(h)  # blame
        return jnp.sum(jnp.where(h > 0, root, h))

    return Problem(loss, {"scale": jnp.float32(2.0)}, (jnp.array([1.0, 3.0, -2.0]),))


@nonfinite(CASES, "log of zero", index=(0,))
def where_log():
    def loss(p):
        surprise = -jnp.log(p)  # blame
        return jnp.sum(jnp.where(p > 0, p * surprise, 0.0))

    return Problem(loss, jnp.array([0.0, 0.25, 0.75]))


@nonfinite(CASES, "division by zero", index=(1,))
def where_division():
    def loss(w, x, count):
        total = x * w
        mean = jnp.where(count > 0, total / count, 0.0)  # blame
        return jnp.sum(mean**2)

    args = (jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 0.0, 4.0]))
    return Problem(loss, jnp.float32(1.5), args)


@nonfinite(CASES, "norm at zero", phase="backward", index=(1,))
def where_norm():
    def loss(w, mask):
        h = w * mask[:, None]
        length = jnp.linalg.norm(h, axis=-1)  # blame
        return jnp.sum(jnp.where(mask > 0, length, 0.0))

    return Problem(loss, draw(0, 3, 4), (jnp.array([1.0, 0.0, 1.0]),))


@nonfinite(CASES, "infinite slope", phase="backward", index=(0,))
def where_arccos():
    def loss(cosine):
        angle = jnp.where(cosine < 1, jnp.arccos(cosine), 0.0)  # blame
        return jnp.sum(angle)

    return Problem(loss, jnp.array([1.0, 0.3]))


@nonfinite(CASES, "infinite slope", phase="backward", index=(1,))
def where_power():
    def gamma_corrected(image):
        curve = 1.055 * image ** (1 / 2.4) - 0.055  # blame
        return jnp.where(image <= 0.003, 12.92 * image, curve)

    def loss(image, target):
        return jnp.mean((gamma_corrected(image) - target) ** 2)

    return Problem(loss, jnp.array([0.5, 0.0, 0.2]), (jnp.array([0.7, 0.1, 0.4]),))


@nonfinite(CASES, "division by zero", index=(1,))
def where_sinc():
    def loss(w, x):
        phase = w * x
        ratio = jnp.sin(phase) / phase  # blame
        return jnp.sum(jnp.where(x == 0, 1.0, ratio))

    return Problem(loss, jnp.float32(0.7), (jnp.array([-1.0, 0.0, 1.0]),))


@nonfinite(CASES, "overflow", index=(1,))
def where_exp():
    """The linear branch is taken; the other overflows, and 0 times inf is NaN."""

    def loss(w):
        grown = jnp.exp(w)  # blame
        return jnp.sum(jnp.where(w > 20, w, grown))

    return Problem(loss, jnp.array([1.0, 100.0]))


# Slopes without end


@nonfinite(CASES, "norm at zero", phase="backward")
def norm_at_zero():
    def loss(w, x):
        penalty = jnp.linalg.norm(w)  # blame
        return jnp.sum(x @ w) + 0.1 * penalty

    return Problem(loss, jnp.zeros(3), (draw(1, 4, 3),))


@nonfinite(CASES, "norm at zero", "infinite slope", phase="backward")
def root_of_a_sum_of_squares():
    def loss(params, target):
        error = params["place"] - target
        square = jnp.sum(error**2)
        return jnp.sqrt(square)  # blame

    return Problem(loss, {"place": jnp.ones(2)}, (jnp.ones(2),))


@nonfinite(CASES, "infinite slope", "norm at zero", phase="backward", index=(1,))
def std_of_a_constant_row():
    def loss(w, x):
        spread = jnp.std(x * w, axis=1)  # blame
        return jnp.mean(spread)

    x = jnp.array([[1.0, 2.0, 4.0], [2.0, 2.0, 2.0]])
    return Problem(loss, jnp.float32(1.0), (x,))


@nonfinite(CASES, "infinite slope", "norm at zero", phase="backward", index=(0, 0))
def pairwise_distances():
    def loss(points):
        between = points[:, None] - points[None]
        distance = jnp.sqrt(jnp.sum(between**2, -1))  # blame
        return jnp.sum(jnp.triu(jnp.exp(-distance), 1))

    return Problem(loss, draw(2, 3, 2))


@nonfinite(CASES, "infinite slope", phase="backward", index=(0,))
def cube_root():
    def loss(w):
        return jnp.sum(jnp.cbrt(w))  # blame

    return Problem(loss, jnp.array([0.0, 8.0]))


@nonfinite(CASES, "infinite slope", phase="backward", index=(2,))
def fourth_root_as_a_power():
    def loss(w, x):
        h = jnp.square(x @ w)
        return jnp.sum(h**0.25)  # blame

    x = jnp.array([[1.0, 0.0], [2.0, 1.0], [-1.0, 2.0]])
    return Problem(loss, jnp.array([1.0, 0.5]), (x,))


@nonfinite(CASES, "infinite slope", "division by zero", phase="backward")
def angle_of_the_origin():
    def loss(point):
        angle = jnp.arctan2(point[1], point[0])  # blame
        return angle**2 + jnp.sum(point)

    return Problem(loss, jnp.zeros(2))


@nonfinite(CASES, "infinite slope", "division by zero", phase="backward")
def hyperbolic_distance_to_itself():
    def loss(u, v):
        gap = jnp.sum((u - v) ** 2)
        room = (1 - jnp.sum(u**2)) * (1 - jnp.sum(v**2))
        return jnp.arccosh(1 + 2 * gap / room)  # blame

    return Problem(loss, jnp.array([0.1, 0.2]), (jnp.array([0.1, 0.2]),))


# Logarithms


@nonfinite(CASES, "log of zero", index=(1,))
def kl_with_a_zero_probability():
    def loss(weights, q):
        p = weights / weights.sum()
        ratio = jnp.log(p / q)  # blame
        return jnp.sum(p * ratio)

    return Problem(loss, jnp.array([1.0, 0.0, 3.0]), (jnp.array([0.3, 0.3, 0.4]),))


@nonfinite(CASES, "log of zero", phase="forward", index=(1,))
def cross_entropy_of_a_saturated_sigmoid():
    def loss(params, x, y):
        p = jax.nn.sigmoid(x @ params["w"] + params["b"])
        hit = y * jnp.log(p)
        miss = (1 - y) * jnp.log(1 - p)  # blame
        return -jnp.mean(hit + miss)

    params = {"w": jnp.array([1.0, 20.0]), "b": jnp.float32(0.0)}
    x = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.5, -0.1]])
    return Problem(loss, params, (x, jnp.array([1.0, 1.0, 0.0])))


@nonfinite(CASES, "log of zero", phase="forward", index=(0, 0))
def log_of_softmax():
    def loss(logits, y):
        p = jax.nn.softmax(logits)
        log_p = jnp.log(p)  # blame
        return -jnp.mean(log_p[jnp.arange(2), y])

    logits = jnp.array([[-150.0, 50.0], [1.0, 2.0]])
    return Problem(loss, logits, (jnp.array([0, 1]),))


@nonfinite(CASES, "log of zero", phase="forward")
def log1p_of_minus_one():
    def loss(rate):
        return jnp.log1p(-rate) * 0.5  # blame

    return Problem(loss, jnp.float32(1.0))


@nonfinite(CASES, "log of zero", phase="forward", index=(1,))
def squashed_policy():
    """The log-probability of a tanh-squashed action, as in soft actor-critic."""

    def loss(mean, noise):
        u = mean + 0.1 * noise
        action = jnp.tanh(u)
        log_p = -0.5 * noise**2 - jnp.log(1 - action**2)  # blame
        return jnp.mean(log_p)

    return Problem(loss, jnp.array([0.1, 15.0, -0.3]), (draw(3, 3),))


@nonfinite(CASES, "log of zero", index=(2,))
def geometric_mean():
    """The loss is 0, and finite; its gradient isn't."""

    def loss(w):
        logs = jnp.log(w)  # blame
        return jnp.exp(jnp.mean(logs))

    return Problem(loss, jnp.array([1.0, 2.0, 0.0]))


@nonfinite(CASES, "domain", phase="forward", index=(1,))
def log_of_a_negative():
    def loss(w, x):
        rate = x @ w
        return jnp.mean(rate - jnp.log(rate))  # blame

    return Problem(loss, jnp.array([1.0, -2.0]), (jnp.array([[3.0, 1.0], [1.0, 1]]),))


# Outside the domain, at a pole


@nonfinite(CASES, "domain", phase="forward", index=(1,))
def arccos_of_more_than_one():
    def loss(u, v):
        cosine = jnp.sum(u * v, -1)
        return jnp.mean(jnp.arccos(cosine))  # blame

    v = jnp.array([[1.0, 0.0], [0.6, 0.9]])
    return Problem(loss, jnp.array([[0.6, 0.8], [0.6, 0.8]]), (v,))


@nonfinite(CASES, "domain", phase="forward")
def power_of_a_negative():
    def loss(w):
        return jnp.sum(w**1.5)  # blame

    return Problem(loss, jnp.array([-1.0]))


@nonfinite(CASES, "domain", "other", phase="forward", index=(0,))
def gamma_function_at_its_pole():
    def loss(concentration):
        return jnp.sum(gammaln(concentration))  # blame

    return Problem(loss, jnp.array([0.0, 1.5]))


@nonfinite(CASES, "domain", "other", phase="forward", index=(1,))
def digamma_at_its_pole():
    def loss(concentration):
        expected_log = digamma(concentration)  # blame
        return jnp.sum(concentration * expected_log)

    return Problem(loss, jnp.array([2.0, 0.0]))


# Division


@nonfinite(CASES, "division by zero", phase="forward", index=(1,))
def unit_vector_of_zero():
    def loss(vectors):
        length = jnp.sqrt(jnp.sum(vectors**2, -1, keepdims=True))
        return jnp.sum((vectors / length)[:, 0])  # blame

    return Problem(loss, jnp.array([[3.0, 4.0], [0.0, 0.0]]))


@nonfinite(CASES, "division by zero", phase="forward", index=(1,))
def cosine_similarity_with_a_zero_row():
    def loss(a, b):
        lengths = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
        similarity = jnp.sum(a * b, 1) / lengths  # blame
        return 1 - jnp.mean(similarity)

    return Problem(loss, draw(4, 2, 3), (jnp.array([[1.0, 2.0, 0.0], [0, 0, 0]]),))


@nonfinite(CASES, "division by zero", phase="forward")
def normalised_constant():
    def loss(gain, x):
        centred = x - jnp.mean(x)
        variance = jnp.mean(centred**2)
        normed = centred / jnp.sqrt(variance)  # blame
        return jnp.sum((gain * normed - 1) ** 2)

    return Problem(loss, jnp.ones(4), (jnp.full(4, 3.0),))


@nonfinite(CASES, "division by zero", phase="forward")
def mean_over_an_empty_mask():
    def loss(w, x, mask):
        errors = (x @ w) ** 2
        return jnp.sum(mask * errors) / jnp.sum(mask)  # blame

    return Problem(loss, draw(5, 3), (draw(6, 4, 3), jnp.zeros(4)))


@nonfinite(CASES, "division by zero", phase="forward", index=(1,))
def reciprocal_square_root():
    def loss(precision):
        return jnp.sum(lax.rsqrt(precision))  # blame

    return Problem(loss, jnp.array([4.0, 0.0]))
