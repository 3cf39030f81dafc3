"""Correct losses of training schemes: noise, stopped gradients, pairs, penalties."""

import jax
import jax.numpy as jnp
from jax import lax

from corpus.case import Case, Problem, case, draw, labels

CASES: list[Case] = []


@case(CASES)
def dropout(plant):
    @plant
    def dense(weight, bias, h):
        return jnp.tanh(h @ weight + bias)

    def loss(params, x, y, key):
        (w1, b1), (w2, b2) = params
        h = dense(w1, b1, x)
        keep = jax.random.uniform(key, h.shape, jnp.float32) < 0.7
        return jnp.mean((jnp.where(keep, h / 0.7, 0.0) @ w2 + b2 - y) ** 2)

    args = (draw(62, 8, 4), draw(63, 8, 2), jax.random.key(0))
    return Problem(
        loss, ((draw(64, 4, 10), draw(114, 10)), (draw(65, 10, 2), draw(115, 2))), args
    )


@case(CASES)
def variational_autoencoder(plant):
    @plant
    def reparametrised(mean, log_var, noise):
        return mean + jnp.exp(log_var / 2) * noise

    def loss(params, x, key):
        mean, log_var = x @ params["mean"], x @ params["log_var"]
        noise = jax.random.normal(key, mean.shape, jnp.float32)
        decoded = jnp.tanh(reparametrised(mean, log_var, noise) @ params["decoder"])
        divergence = (mean**2 + jnp.exp(log_var) - 1 - log_var).sum(-1) / 2
        return jnp.mean(((decoded - x) ** 2).sum(-1) + 0.1 * divergence)

    params = {
        "mean": draw(65, 6, 2, scale=0.4),
        "log_var": draw(66, 6, 2, scale=0.2),
        "decoder": draw(67, 2, 6),
    }
    return Problem(loss, params, (draw(68, 5, 6), jax.random.key(1)))


@case(CASES)
def gumbel_softmax(plant):
    @plant
    def relaxed(logits, noise):
        return jax.nn.softmax((logits + noise) / 0.5)

    def loss(params, key):
        noise = jax.random.gumbel(key, (16, 5), jnp.float32)
        return jnp.mean((relaxed(params["logits"], noise) @ params["codes"]) ** 2)

    params = {"logits": draw(69, 5), "codes": draw(70, 5, 3)}
    return Problem(loss, params, (jax.random.key(2),))


@case(CASES, stopped=True)
def straight_through_rounding(plant):
    @plant
    def dense(weight, x):
        return x @ weight

    def quantized(h):
        return h + lax.stop_gradient(jnp.round(4 * h) / 4 - h)

    def loss(params, x, y):
        return jnp.mean((quantized(dense(params["weight"], x)) + params["b"] - y) ** 2)

    params = {"weight": draw(71, 3, 3), "b": draw(72, 3)}
    return Problem(loss, params, (draw(73, 6, 3), draw(74, 6, 3)))


@case(CASES, stopped=True)
def straight_through_argmax(plant):
    @plant
    def read(codes, weights):
        return weights @ codes

    def loss(params):
        soft = jax.nn.softmax(params["logits"])
        hard = jax.nn.one_hot(jnp.argmax(soft, -1), 4, dtype=soft.dtype)
        weights = soft + lax.stop_gradient(hard - soft)
        return jnp.sum(jnp.sin(read(params["codes"], weights)))

    return Problem(loss, {"logits": draw(75, 6, 4), "codes": draw(76, 4, 3)})


@case(CASES, stopped=True)
def target_network(plant):
    @plant
    def q_values(weight, bias, state):
        return jnp.tanh(state @ weight) @ bias

    def loss(params, state, action, reward, after):
        q = q_values(*params, state)[jnp.arange(len(action)), action]
        best = q_values(*lax.stop_gradient(params), after).max(-1)
        return jnp.mean((q - reward - 0.9 * best) ** 2)

    args = (draw(77, 6, 3), labels(2, 6, 2), draw(78, 6), draw(79, 6, 3))
    return Problem(loss, (draw(80, 3, 5), draw(81, 5, 2)), args)


@case(CASES, stopped=True)
def policy_gradient(plant):
    @plant
    def log_policy(weight, state):
        return jax.nn.log_softmax(state @ weight)

    def loss(params, state, action, reward):
        value = state @ params["value"]
        advantage = lax.stop_gradient(reward - value)
        chosen = log_policy(params["policy"], state)[jnp.arange(len(action)), action]
        return jnp.mean((value - reward) ** 2) - jnp.mean(chosen * advantage)

    params = {"policy": draw(82, 3, 4), "value": draw(83, 3)}
    return Problem(loss, params, (draw(84, 9, 3), labels(3, 9, 4), draw(85, 9)))


@case(CASES, stopped=True)
def siamese_stop_gradient(plant):
    @plant
    def cosine(a, b):
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return jnp.sum(a * b, -1) / norms

    def loss(params, one, two):
        z1, z2 = jnp.tanh(one @ params["encode"]), jnp.tanh(two @ params["encode"])
        p1, p2 = z1 @ params["predict"], z2 @ params["predict"]
        stop = lax.stop_gradient
        return -jnp.mean(cosine(p1, stop(z2)) + cosine(p2, stop(z1))) / 2

    params = {"encode": draw(86, 5, 4), "predict": draw(87, 4, 4)}
    return Problem(loss, params, (draw(88, 6, 5), draw(89, 6, 5)))


def clipped_backwards(x, limit):
    return x


clipped_backwards = jax.custom_vjp(clipped_backwards)
clipped_backwards.defvjp(
    lambda x, limit: (x, limit),
    lambda limit, ct: (jnp.clip(ct, -limit, limit), jnp.zeros_like(limit)),
)


@case(CASES, stopped=True)
def trusted_gradient_clipping(plant):
    @plant
    def dense(weight, x):
        return jnp.tanh(x @ weight)

    def loss(weight, x):
        return jnp.sum(clipped_backwards(dense(weight, x), jnp.array(0.5)) ** 2)

    return Problem(loss, draw(90, 4, 3), (draw(91, 5, 4),), (clipped_backwards,))


@jax.custom_jvp
def reversed_gradient(x):
    return x


reversed_gradient.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


@case(CASES, stopped=True)
def trusted_gradient_reversal(plant):
    @plant
    def features(weight, x):
        return jnp.tanh(x @ weight)

    def loss(params, x, y, domain):
        h = features(params["features"], x)
        task = jnp.mean((h @ params["task"] - y) ** 2)
        guess = reversed_gradient(h) @ params["domain"]
        return task + jnp.mean(jnp.logaddexp(0, guess) - domain * guess)

    names = {"features": (4, 5), "task": (5,), "domain": (5,)}
    params = {
        name: draw(92 + i, *shape) for i, (name, shape) in enumerate(names.items())
    }
    args = (draw(95, 6, 4), draw(96, 6), jnp.array([0.0, 1, 0, 1, 1, 0]))
    return Problem(loss, params, args, (reversed_gradient,))


@case(CASES)
def contrastive(plant):
    @plant
    def unit(z):
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)

    def loss(params, one, two):
        logits = unit(one @ params["one"]) @ unit(two @ params["two"]).T / 0.2
        rows, columns = jax.nn.log_softmax(logits, 0), jax.nn.log_softmax(logits, 1)
        return -jnp.mean(jnp.diag(rows) + jnp.diag(columns))

    params = {"one": draw(97, 4, 3), "two": draw(98, 4, 3)}
    return Problem(loss, params, (draw(99, 6, 4), draw(100, 6, 4)))


@case(CASES)
def triplet_margin(plant):
    @plant
    def distance(a, b):
        return jnp.sqrt(jnp.sum((a - b) ** 2, -1) + 1e-6)

    def loss(weight, anchor, near, far):
        a, p, n = anchor @ weight, near @ weight, far @ weight
        return jnp.mean(jax.nn.relu(distance(a, p) - distance(a, n) + 1))

    args = tuple(draw(101 + i, 7, 4) for i in range(3))
    return Problem(loss, draw(104, 4, 4), args)


@case(CASES)
def per_example_penalty(plant):
    """A gradient penalty: the loss holds a gradient with respect to the data."""

    @plant
    def penalty(slopes):
        return jnp.mean((jnp.sum(slopes**2, -1) - 1) ** 2)

    def loss(params, x):
        def critic(row):
            return jnp.tanh(row @ params["weight"]) @ params["head"]

        return penalty(jax.vmap(jax.grad(critic))(x)) + jnp.mean(jax.vmap(critic)(x))

    params = {"weight": draw(115, 3, 6), "head": draw(116, 6)}
    return Problem(loss, params, (draw(117, 5, 3),))


@case(CASES)
def physics_informed(plant):
    @plant
    def residual(second, value):
        return jnp.mean((second + value) ** 2)

    def loss(params, times):
        def u(t):
            return jnp.tanh(t * params["w"] + params["b"]) @ params["v"]

        slope = jax.vmap(jax.grad(u))
        _, second = jax.jvp(slope, (times,), (jnp.ones_like(times),))
        return residual(second, jax.vmap(u)(times)) + (u(0.0) - 1) ** 2

    params = {name: draw(118 + i, 6) for i, name in enumerate("wbv")}
    return Problem(loss, params, (jnp.linspace(0, 1, 7),))


@case(CASES)
def one_step_meta_learning(plant):
    @plant
    def squared(prediction, y):
        return jnp.mean((prediction - y) ** 2)

    def loss(params, x, y, x_new, y_new):
        def inner(weight):
            return jnp.mean(jnp.tanh(x @ weight - y) ** 2)

        weight = params["start"] - params["rate"] * jax.grad(inner)(params["start"])
        return squared(jnp.tanh(x_new @ weight), y_new)

    params = {"start": draw(121, 3), "rate": jnp.float32(0.3)}
    args = (draw(122, 6, 3), draw(123, 6), draw(124, 6, 3), draw(125, 6))
    return Problem(loss, params, args)
