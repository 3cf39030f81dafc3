"""Correct losses of functions, indices and control flow."""

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as tf
from jax import lax
from jax.scipy import special

from corpus.case import Case, Problem, case, draw

CASES: list[Case] = []


# Functions of one number


def torch_special(x, y):
    one = torch.erf(x) + torch.erfc(x / 2) + torch.lgamma(y) + torch.digamma(y)
    return (one + torch.special.i0e(x) + torch.special.log_ndtr(x)).sum()


@case(CASES, twin=torch_special)
def special_functions(plant):
    @plant
    def of_y(y):
        return special.gammaln(y) + special.digamma(y)

    def loss(params):
        x, y = params
        of_x = special.erf(x) + special.erfc(x / 2)
        return jnp.sum(of_x + of_y(y) + special.i0e(x) + special.log_ndtr(x))

    return Problem(loss, (draw(0, 6), 0.5 + jnp.abs(draw(1, 6))))


@case(CASES)
def special_functions_by_iteration(plant):
    @plant
    def incomplete(x):
        return special.betainc(2.0, 3.5, x) + special.gammainc(1.5, 3 * x)

    def loss(raw):
        x = jax.nn.sigmoid(raw)
        return jnp.sum(incomplete(x) + special.ndtri(x) + special.i1e(x))

    return Problem(loss, draw(2, 6))


@case(CASES)
def entropies(plant):
    @plant
    def entropy(p):
        return jnp.sum(special.entr(p))

    def loss(logits, q):
        p = jax.nn.softmax(logits)
        return entropy(p) + jnp.sum(special.rel_entr(p, q) + special.xlogy(q, p))

    return Problem(loss, draw(3, 5), (jax.nn.softmax(draw(4, 5)),))


@case(CASES)
def powers_and_angles(plant):
    @plant
    def polar(x, y):
        return jnp.hypot(x, y), jnp.arctan2(y, x)

    def loss(params):
        x, y = params
        radius, angle = polar(x, y)
        return jnp.sum(radius ** jnp.sin(y) + angle * jnp.sinc(x) + jnp.cbrt(2 + x))

    return Problem(loss, (draw(5, 6), draw(6, 6)))


def torch_activations(x):
    kinds = (tf.silu, tf.softplus, tf.elu, tf.selu, tf.mish, torch.sigmoid)
    return sum((i + 1) * f(x).sum() for i, f in enumerate(kinds))


@case(CASES, twin=torch_activations)
def activations(plant):
    @plant
    def softplus(x):
        return jax.nn.softplus(x)

    def loss(x):
        nn = jax.nn
        kinds = (nn.silu, softplus, nn.elu, nn.selu, nn.mish, nn.sigmoid)
        return sum((i + 1) * jnp.sum(f(x)) for i, f in enumerate(kinds))

    return Problem(loss, draw(7, 9, scale=2.0))


def torch_rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@case(CASES, twin=torch_rosenbrock)
def rosenbrock(plant):
    @plant
    def valley(x):
        return x[1:] - x[:-1] ** 2

    def loss(x):
        return jnp.sum(100 * valley(x) ** 2 + (1 - x[:-1]) ** 2)

    return Problem(loss, draw(8, 6))


def torch_logistic(weight, bias, x, y):
    z = x @ weight + bias
    return tf.binary_cross_entropy_with_logits(z, y)


@case(CASES, twin=torch_logistic)
def logistic_regression(plant):
    @plant
    def log_likelihood(z, y):
        return y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z)

    def loss(params, x, y):
        weight, bias = params
        return -jnp.mean(log_likelihood(x @ weight + bias, y))

    params = (draw(9, 4), jnp.float32(0.2))
    return Problem(loss, params, (draw(10, 8, 4), jnp.arange(8.0) % 2))


@case(CASES)
def count_likelihoods(plant):
    """Negative binomial and Poisson regression."""

    @plant
    def negative_binomial(rate, size, y):
        ratio = special.gammaln(y + size) - special.gammaln(size)
        return (
            ratio
            + size * jnp.log(size / (size + rate))
            + y * jnp.log(rate / (size + rate))
        )

    def loss(params, x, y):
        rate = jnp.exp(x @ params["weight"])
        poisson = y * jnp.log(rate) - rate
        size = jnp.exp(params["log_size"])
        return -jnp.mean(negative_binomial(rate, size, y) + poisson)

    params = {"weight": draw(11, 3, scale=0.5), "log_size": jnp.float32(0.4)}
    return Problem(
        loss, params, (draw(12, 8, 3), jnp.array([0.0, 1, 4, 2, 0, 3, 1, 7]))
    )


@case(CASES)
def proportional_hazards(plant):
    @plant
    def log_risk_sets(scores):
        return lax.cumlogsumexp(scores, reverse=True)

    def loss(weight, x, event):
        scores = x @ weight
        return -jnp.mean(event * (scores - log_risk_sets(scores)))

    event = jnp.array([1.0, 0, 1, 1, 0, 1, 1])
    return Problem(loss, draw(13, 4), (draw(14, 7, 4), event))


# Order, indices, shapes


def torch_cumulative(x):
    total = torch.cumsum(x, 0).sin().sum() + torch.cumprod(x, 0).sum()
    return total + torch.logcumsumexp(x, 0).square().sum()


@case(CASES, twin=torch_cumulative)
def cumulative(plant):
    @plant
    def running_product(x):
        return jnp.cumprod(x)

    def loss(x):
        total = jnp.sum(jnp.sin(jnp.cumsum(x))) + jnp.sum(running_product(x))
        return total + jnp.sum(lax.cumlogsumexp(x) ** 2)

    return Problem(loss, draw(15, 7))


@case(CASES)
def products_with_a_zero(plant):
    @plant
    def row_products(x):
        return jnp.prod(x, axis=1)

    def loss(x):
        return jnp.sum(jnp.sin(row_products(x)))

    return Problem(loss, draw(16, 4, 4).at[1, 2].set(0))


def torch_log_sum_exp(x, y):
    return (torch.logsumexp(x @ y, 1) * torch.arange(4)).sum()


@case(CASES, twin=torch_log_sum_exp)
def log_sum_exp(plant):
    @plant
    def smooth_max(scores):
        return jax.nn.logsumexp(scores, axis=1)

    def loss(params):
        x, y = params
        return jnp.sum(smooth_max(x @ y) * jnp.arange(4))

    return Problem(loss, (draw(17, 4, 4), draw(18, 4, 4)))


@case(CASES)
def log_sum_exp_of_thousands(plant):
    @plant
    def smooth_max(scores):
        return jax.nn.logsumexp(scores)

    def loss(x):
        return smooth_max(1000 + x) + smooth_max(-1000 + 2 * x)

    return Problem(loss, draw(19, 6))


def torch_sorted(x, weights):
    return torch.sort(x, descending=True)[0].tanh() @ weights


@case(CASES, twin=torch_sorted)
def sorted_weights(plant):
    @plant
    def descending(x):
        return -jnp.sort(-x)

    def loss(x, weights):
        return jnp.tanh(descending(x)) @ weights

    return Problem(loss, draw(20, 8), (draw(21, 8),))


def torch_top(x):
    return torch.topk(x, 3, dim=1)[0].square().sum()


@case(CASES, twin=torch_top)
def top_three(plant):
    @plant
    def best(x):
        return lax.top_k(x, 3)[0]

    def loss(x):
        return jnp.sum(best(x) ** 2)

    return Problem(loss, draw(22, 4, 6))


@case(CASES)
def quantiles(plant):
    @plant
    def quartile(x):
        return jnp.quantile(x, 0.25)

    def loss(x):
        return quartile(x) ** 2 + jnp.median(x) + jnp.sum(lax.cummax(x)) / 9

    return Problem(loss, draw(23, 9))


def torch_gather(x, order):
    return (torch.gather(x, 1, order) * torch.arange(3)).sin().sum()


@case(CASES, twin=torch_gather)
def gather_along_axis(plant):
    @plant
    def pick(x, order):
        return jnp.take_along_axis(x, order, axis=1)

    def loss(x, order):
        return jnp.sum(jnp.sin(pick(x, order) * jnp.arange(3)))

    order = jnp.array([[0, 2, 2], [4, 1, 0], [3, 3, 3], [1, 0, 4]])
    return Problem(loss, draw(24, 4, 5), (order,))


@case(CASES)
def scatter(plant):
    @plant
    def placed(base, values, where):
        added = base.at[where].add(values)
        return added.at[0].set(values[0] ** 2).at[2].multiply(values[1])

    def loss(params, where):
        return jnp.sum(jnp.sin(placed(params["base"], params["values"], where)))

    params = {"base": draw(25, 6), "values": draw(26, 4)}
    return Problem(loss, params, (jnp.array([1, 3, 3, 5]),))


@case(CASES)
def segments(plant):
    @plant
    def largest(x, groups):
        return jax.ops.segment_max(x, groups, num_segments=3)

    def loss(params, groups):
        total = jax.ops.segment_sum(params["x"], groups, num_segments=3)
        return jnp.sum(jnp.tanh(total) * params["scale"] + largest(params["x"], groups))

    params = {"x": draw(27, 8), "scale": draw(28, 3)}
    return Problem(loss, params, (jnp.array([0, 1, 0, 2, 2, 1, 0, 2]),))


@case(CASES)
def sliding_updates(plant):
    @plant
    def update(buffer, at):
        part = lax.dynamic_slice(buffer, (at,), (3,))
        return lax.dynamic_update_slice(buffer, jnp.sin(part) + part[::-1], (at,))

    def loss(x):
        return jnp.sum(lax.fori_loop(0, 5, lambda i, b: update(b, i), x) ** 2)

    return Problem(loss, draw(29, 8))


@case(CASES)
def reshuffled(plant):
    @plant
    def framed(x):
        return jnp.pad(jnp.roll(x, 2, axis=1), ((1, 1), (0, 2)), mode="reflect")

    def loss(x):
        left, right = jnp.split(jnp.flip(framed(x), 0), 2, axis=1)
        return jnp.sum(jnp.concatenate([left * right, jnp.exp(right)]) ** 2)

    return Problem(loss, draw(30, 4, 6, scale=0.5))


@case(CASES)
def interpolation(plant):
    @plant
    def curve(heights, knots, x):
        return jnp.interp(x, knots, heights)

    def loss(params, knots, image):
        fit = jnp.sum(curve(params["heights"], knots, jnp.tanh(params["x"])) ** 2)
        at = [2 + jnp.tanh(params["x"]), 2 - jnp.tanh(params["x"])]
        return fit + jnp.sum(jax.scipy.ndimage.map_coordinates(image, at, order=1))

    params = {"heights": draw(31, 5), "x": draw(32, 4)}
    return Problem(loss, params, (jnp.linspace(-1.2, 1.2, 5), draw(33, 5, 5)))


# Complex numbers inside


def torch_low_pass(x, target, window):
    smooth = torch.fft.irfft(torch.fft.rfft(x) * window, n=16)
    return (smooth - target).square().sum()


@case(CASES, twin=torch_low_pass)
def fourier_low_pass(plant):
    @plant
    def spectrum(x):
        return jnp.fft.rfft(x)

    def loss(x, target, window):
        return jnp.sum((jnp.fft.irfft(spectrum(x) * window, n=16) - target) ** 2)

    window = jnp.exp(-jnp.arange(9.0) / 3)
    return Problem(loss, draw(34, 16), (draw(35, 16), window))


def torch_power_spectrum(x):
    return torch.log1p(torch.fft.fft(torch.tanh(x)).abs().square()).sum()


@case(CASES, twin=torch_power_spectrum)
def fourier_power_spectrum(plant):
    @plant
    def squashed(x):
        return jnp.tanh(x)

    def loss(x):
        return jnp.sum(jnp.log1p(jnp.abs(jnp.fft.fft(squashed(x))) ** 2))

    return Problem(loss, draw(36, 4, 8))


@case(CASES)
def complex_inside(plant):
    @plant
    def joined(real, imaginary):
        return lax.complex(real, imaginary)

    def loss(params, target):
        matrix = joined(params["real"], params["imaginary"])
        state = matrix @ jnp.exp(1j * params["phase"])
        return jnp.sum(jnp.abs(state - target) ** 2) + jnp.angle(state[0])

    params = {"real": draw(37, 3, 3), "imaginary": draw(38, 3, 3), "phase": draw(39, 3)}
    return Problem(loss, params, (draw(40, 3),))


# Control flow


@case(CASES)
def conditional(plant):
    @plant
    def bumpy(x):
        return jnp.sin(x) * x

    def loss(params, flag):
        x = lax.cond(flag > 0, lambda p: bumpy(p["a"]), lambda p: p["b"], params)
        return lax.cond(jnp.sum(x) > -100, lambda x: jnp.sum(x**2), jnp.sum, x)

    return Problem(loss, {"a": draw(41, 4), "b": draw(42, 4)}, (jnp.int32(1),))


@case(CASES)
def switched(plant):
    @plant
    def second(x):
        return jnp.exp(-x)

    def loss(params, index):
        branches = (jnp.sin, second, jnp.cosh)
        each = jax.vmap(lambda i, x: lax.switch(i, branches, x))(index, params["x"])
        return jnp.sum(each * params["scale"])

    params = {"x": draw(43, 6), "scale": draw(44, 6)}
    return Problem(loss, params, (jnp.array([0, 1, 2, 1, 1, 0]),))


@case(CASES)
def scan_with_conditional(plant):
    @plant
    def leap(state, gain):
        return state * gain + jnp.cos(state)

    def loss(params):
        def step(state, t):
            even = t % 2 == 0
            state = lax.cond(
                even, lambda s: leap(s, params["gain"]), lambda s: s / 2, state
            )
            return state, state

        _, path = lax.scan(step, params["start"], jnp.arange(6))
        return jnp.mean(path**2)

    return Problem(loss, {"start": draw(45, 3), "gain": draw(46, 3)})


@case(CASES)
def loop_with_fixed_bounds(plant):
    @plant
    def logistic_map(r, x):
        return r * x * (1 - x)

    def loss(params):
        r, x = 2 + jax.nn.sigmoid(params["r"]), jax.nn.sigmoid(params["x"])
        return jnp.sum(lax.fori_loop(0, 8, lambda _, x: logistic_map(r, x), x))

    return Problem(loss, {"r": draw(47, 4), "x": draw(48, 4)})


@case(CASES)
def hand_written_rule(plant):
    """A custom rule that is right: x log x, with its limit at 0."""

    @plant
    def weights(x):
        return jax.nn.sigmoid(x)

    @jax.custom_vjp
    def x_log_x(x):
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1)), 0)

    x_log_x.defvjp(lambda x: (x_log_x(x), x), lambda x, ct: (ct * (1 + jnp.log(x)),))

    def loss(x):
        return jnp.sum(x_log_x(weights(x)))

    return Problem(loss, draw(49, 6))


@case(CASES)
def safe_where(plant):
    @plant
    def safe_root(x):
        positive = x > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)

    def loss(params, x):
        z = x @ params["weight"]
        safe = jnp.where(jnp.abs(z) > 1e-3, z, 1.0)
        return jnp.sum(safe_root(z)) + jnp.sum(jnp.where(safe == z, jnp.sin(z) / z, 1))

    return Problem(loss, {"weight": draw(50, 3, 4)}, (draw(51, 5, 3),))
