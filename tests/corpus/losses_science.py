"""Correct losses of statistics and physics: likelihoods, filters, implicit rules."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import lax

from corpus.case import Case, Problem, case, draw

CASES: list[Case] = []


class Kernel(NamedTuple):
    length: jax.Array
    noise: jax.Array
    scale: jax.Array


def torch_gaussian_process(length, noise, scale, x, y):
    gap = (x[:, None] - x) / torch.exp(length)
    eye = torch.eye(len(x), dtype=x.dtype)
    cov = torch.exp(scale - gap**2 / 2) + torch.exp(noise) * eye
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(y), cov)
    return -normal.log_prob(y)


@case(CASES, twin=torch_gaussian_process)
def gaussian_process(plant):
    @plant
    def covariance(length, scale, x):
        return jnp.exp(scale - ((x[:, None] - x) / jnp.exp(length)) ** 2 / 2)

    def loss(kernel, x, y):
        eye = jnp.eye(len(x), dtype=x.dtype)
        cov = covariance(kernel.length, kernel.scale, x) + jnp.exp(kernel.noise) * eye
        factor = jnp.linalg.cholesky(cov)
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        log_det = jnp.sum(jnp.log(jnp.diag(factor)))
        return white @ white / 2 + log_det + len(x) / 2 * jnp.log(2 * jnp.pi)

    params = Kernel(jnp.float32(-0.3), jnp.float32(-2.0), jnp.float32(0.2))
    x = jnp.linspace(-2, 2, 9)
    return Problem(loss, params, (x, jnp.sin(2 * x)))


@case(CASES)
def kalman_filter(plant):
    @plant
    def predict(a, mean, cov, q):
        return a @ mean, a @ cov @ a.T + q

    def loss(params, ys):
        a, c = params["a"], params["c"]
        q = jnp.diag(jnp.exp(params["log_q"]))
        r = jnp.exp(params["log_r"])

        def step(state, y):
            mean, cov = predict(a, *state, q)
            spread = c @ cov @ c + r
            gap, gain = y - c @ mean, cov @ c / spread
            state = mean + gain * gap, cov - jnp.outer(gain, c @ cov)
            return state, (jnp.log(spread) + gap**2 / spread) / 2

        start = jnp.zeros_like(c), jnp.eye(2, dtype=a.dtype)
        return jnp.sum(lax.scan(step, start, ys)[1])

    params = {
        "a": jnp.array([[0.9, 0.2], [-0.1, 0.8]]),
        "c": jnp.array([1.0, 0.3]),
        "log_q": jnp.array([-1.0, -1.5]),
        "log_r": jnp.float32(-0.7),
    }
    return Problem(loss, params, (draw(25, 8),))


@case(CASES)
def custom_root_newton(plant):
    @plant
    def coefficients(raw):
        return jnp.exp(raw)

    def loss(raw):
        a, b = coefficients(raw)

        def f(x):
            return x**3 + a * x - b

        def newton(f, x):
            return lax.fori_loop(0, 30, lambda _, x: x - f(x) / jax.grad(f)(x), x)

        def tangent_solve(g, y):
            return y / g(jnp.ones_like(y))

        return jnp.sin(lax.custom_root(f, jnp.ones_like(a), newton, tangent_solve))

    return Problem(loss, jnp.array([0.3, 0.8]))


@case(CASES)
def implicit_fixed_point(plant):
    """An equilibrium network: the forward `while` runs until nothing changes."""

    @plant
    def inject(weight, x):
        return weight @ x

    def step(z, weight, drive):
        return jnp.tanh(weight @ z + drive)

    @jax.custom_vjp
    def equilibrium(weight, drive):
        def moving(state):
            count, z, before = state
            return (count < 500) & jnp.any(z != before)

        def move(state):
            count, z, _ = state
            return count + 1, step(z, weight, drive), z

        start = jnp.zeros_like(drive)
        return lax.while_loop(moving, move, (0, start, start + 1))[1]

    def forward(weight, drive):
        z = equilibrium(weight, drive)
        return z, (z, weight, drive)

    def backward(residual, cotangent):
        z, weight, drive = residual
        jacobian = jax.jacobian(step)(z, weight, drive)
        eye = jnp.eye(len(z), dtype=z.dtype)
        adjoint = jnp.linalg.solve(eye - jacobian.T, cotangent)
        return jax.vjp(lambda w, d: step(z, w, d), weight, drive)[1](adjoint)

    equilibrium.defvjp(forward, backward)

    def loss(params, x, y):
        z = equilibrium(params["inner"], inject(params["outer"], x))
        return jnp.sum((z - y) ** 2)

    params = {"inner": draw(37, 4, 4, scale=0.25), "outer": draw(38, 4, 3)}
    return Problem(loss, params, (draw(39, 3), draw(40, 4)))


@case(CASES)
def while_inside_custom_jvp(plant):
    """A square root by Newton's method, with its derivative given by hand."""

    @plant
    def spread(x):
        return jnp.mean((x - x.mean()) ** 2)

    @jax.custom_jvp
    def root(x):
        def far(state):
            guess, before = state
            return jnp.abs(guess - before) > 1e-6 * guess

        def improve(state):
            guess, _ = state
            return (guess + x / guess) / 2, guess

        return lax.while_loop(far, improve, (1 + x, x))[0]

    @root.defjvp
    def root_jvp(primals, tangents):
        y = root(*primals)
        return y, tangents[0] / (2 * y)

    def loss(x):
        return root(spread(x)) + 0.1 * jnp.sum(x)

    return Problem(loss, draw(41, 6))


@case(CASES)
def sinkhorn_transport(plant):
    @plant
    def cost(a, b):
        return jnp.sum((a[:, None] - b[None]) ** 2, -1)

    def loss(points, others):
        costs = cost(points, others)
        kernel = -costs / 0.5

        def step(potentials, _):
            f, g = potentials
            f = -jax.nn.logsumexp(kernel + g, axis=1)
            g = -jax.nn.logsumexp(kernel + f[:, None], axis=0)
            return (f, g), None

        zero = jnp.zeros_like(costs[0])
        (f, g), _ = lax.scan(step, (zero, zero), length=15)
        return jnp.sum(jnp.exp(kernel + f[:, None] + g) * costs)

    return Problem(loss, draw(44, 5, 2), (draw(45, 5, 2),))


@case(CASES)
def student_mixture_likelihood(plant):
    @plant
    def log_normal(mean, log_scale, x):
        z = (x[:, None] - mean) / jnp.exp(log_scale)
        return -(z**2) / 2 - log_scale

    def loss(params, x):
        weights = jax.nn.log_softmax(params["logits"])
        each = log_normal(params["mean"], params["log_scale"], x) + weights
        return -jnp.mean(jax.nn.logsumexp(each, axis=1))

    names = ("logits", "mean", "log_scale")
    params = {name: draw(53 + i, 3) for i, name in enumerate(names)}
    return Problem(loss, params, (draw(56, 12),))


def torch_mahalanobis(mean, raw, x):
    factor = torch.tril(raw, -1) + torch.diag(torch.exp(raw.diagonal()))
    white = torch.linalg.solve_triangular(factor, (x - mean).T, upper=False)
    return white.square().sum() / 2 + len(x) * raw.diagonal().sum()


@case(CASES, twin=torch_mahalanobis)
def multivariate_normal_fit(plant):
    @plant
    def factor_of(raw):
        return jnp.tril(raw, -1) + jnp.diag(jnp.exp(jnp.diag(raw)))

    def loss(params, x):
        mean, raw = params
        white = jax.scipy.linalg.solve_triangular(
            factor_of(raw), (x - mean).T, lower=True
        )
        return jnp.sum(white**2) / 2 + len(x) * jnp.trace(raw)

    return Problem(loss, (draw(57, 3), draw(58, 3, 3, scale=0.3)), (draw(59, 10, 3),))


@case(CASES)
def hidden_markov_forward(plant):
    @plant
    def advance(log_alpha, log_transition):
        return jax.nn.logsumexp(log_alpha[:, None] + log_transition, axis=0)

    def loss(params, observed):
        transition = jax.nn.log_softmax(params["transition"])
        emission = jax.nn.log_softmax(params["emission"])

        def step(alpha, seen):
            return advance(alpha, transition) + emission[:, seen], None

        start = jax.nn.log_softmax(params["start"]) + emission[:, observed[0]]
        return -jax.nn.logsumexp(lax.scan(step, start, observed[1:])[0])

    params = {
        "start": draw(60, 3),
        "transition": draw(61, 3, 3),
        "emission": draw(62, 3, 4),
    }
    return Problem(loss, params, (jnp.array([0, 2, 1, 1, 3, 0, 2]),))


@case(CASES)
def runge_kutta_predator_prey(plant):
    @plant
    def rates(coefficients, state):
        a, b, c, d = coefficients
        prey, hunter = state
        return jnp.stack([a * prey - b * prey * hunter, c * prey * hunter - d * hunter])

    def loss(params, seen):
        k, h = jnp.exp(params["log_k"]), 0.1

        def step(y, _):
            k1 = rates(k, y)
            k2 = rates(k, y + h / 2 * k1)
            k3 = rates(k, y + h / 2 * k2)
            k4 = rates(k, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            return y, y

        _, path = lax.scan(step, params["start"], length=len(seen))
        return jnp.mean((path - seen) ** 2)

    params = {"log_k": draw(63, 4, scale=0.3), "start": jnp.array([1.0, 0.5])}
    return Problem(loss, params, (1 + draw(64, 10, 2, scale=0.1),))


@case(CASES)
def neural_ode(plant):
    @plant
    def field(weight, bias, y):
        return jnp.tanh(weight @ y + bias)

    def loss(params, start, end):
        def step(_, y):
            middle = y + 0.05 * field(params["weight"], params["bias"], y)
            return y + 0.1 * field(params["weight"], params["bias"], middle)

        return jnp.sum((lax.fori_loop(0, 10, step, start) - end) ** 2)

    params = {"weight": draw(65, 3, 3), "bias": draw(66, 3)}
    return Problem(loss, params, (draw(67, 3), draw(68, 3)))


@case(CASES)
def particle_energy(plant):
    @plant
    def pair_energy(squared):
        return squared**-6 - 2 * squared**-3

    def loss(positions):
        i, j = jnp.triu_indices(len(positions), 1)
        return jnp.sum(pair_energy(jnp.sum((positions[i] - positions[j]) ** 2, -1)))

    corners = jnp.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0], [1, 1, 1]])
    return Problem(loss, corners + draw(69, 5, 3, scale=0.05))
