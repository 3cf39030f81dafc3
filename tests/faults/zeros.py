"""Gradients that are all zero: steps, flat and saturated functions, branches."""

import jax
import jax.numpy as jnp
from corpus.case import draw
from jax import lax

from faults.case import Problem, Zero, zero

CASES: list[Zero] = []


# stop_gradient


@zero(CASES, {"target": ("stop_gradient",)})
def target_network():
    def value(w, x):
        return jnp.tanh(x @ w)

    def loss(params, x, reward):
        goal = reward + 0.9 * value(params["target"], x)
        goal = lax.stop_gradient(goal)  # blame
        return jnp.mean((value(params["online"], x) - goal) ** 2)

    params = {"online": draw(0, 3), "target": draw(1, 3)}
    return Problem(loss, params, (draw(2, 4, 3), draw(3, 4)))


@zero(CASES, {"b": ("stop_gradient",), "w": ("rounding",)})
def two_leaves_two_causes():
    def loss(params, x):
        levels = jnp.round(x * params["w"])  # blame: w
        shift = lax.stop_gradient(params["b"])  # blame: b
        return jnp.sum((levels + shift - params["c"]) ** 2)

    params = {"b": jnp.float32(0.3), "c": jnp.float32(0.4), "w": draw(4, 3)}
    return Problem(loss, params, (draw(5, 3, scale=4.0),))


@zero(CASES, {"w": ("stop_gradient", "rounding")})
def two_paths_both_blocked():
    def loss(params, x):
        held = lax.stop_gradient(x * params["w"])  # blame
        levels = jnp.floor(x * params["w"])  # blame
        return jnp.sum((held + levels - params["b"]) ** 2)

    params = {"b": jnp.float32(0.1), "w": draw(6, 3)}
    return Problem(loss, params, (draw(7, 3),))


# Steps: rounding, choosing, comparing, casting


@zero(CASES, {"w": ("rounding",)})
def quantised_activations():
    def loss(params, x, y):
        h = jnp.tanh(x @ params["w"])
        codes = jnp.round(h * 7) / 7  # blame
        return jnp.mean((codes @ params["out"] - y) ** 2)

    params = {"w": draw(8, 3, 4), "out": draw(9, 4)}
    return Problem(loss, params, (draw(10, 5, 3), draw(11, 5)))


@zero(CASES, {"w": ("rounding",)})
def rounding_inside_a_scan():
    def loss(params, xs):
        def step(total, x):
            ticks = jnp.ceil(x * params["w"])  # blame
            return total + ticks * params["price"], None

        total, _ = lax.scan(step, jnp.float32(0.0), xs)
        return (total - 3) ** 2

    params = {"w": jnp.float32(2.3), "price": jnp.float32(0.5)}
    return Problem(loss, params, (draw(12, 4),))


@zero(CASES, {"scores": ("argmax",)})
def best_arm():
    def loss(params):
        best = jnp.argmax(params["scores"])  # blame
        return (params["values"][best] - 1) ** 2

    return Problem(loss, {"scores": draw(13, 4), "values": draw(14, 4)})


@zero(CASES, {"query": ("argmax",)})
def hard_attention():
    def loss(params, keys, values, y):
        scores = keys @ params["query"]
        best = jnp.argmax(scores, -1)  # blame
        attention = jax.nn.one_hot(best, 4)
        return jnp.sum((attention @ values @ params["out"] - y) ** 2)

    params = {"query": draw(15, 3), "out": draw(16, 2)}
    return Problem(loss, params, (draw(17, 4, 3), draw(18, 4, 2), jnp.float32(0.2)))


@zero(CASES, {"w": ("comparison",)})
def accuracy_as_a_loss():
    def loss(params, x, y):
        hits = (x @ params["w"] > 0) == y  # blame
        return 1 - jnp.mean(hits.astype(jnp.float32)) + params["b"] ** 2

    args = (draw(19, 6, 3), jnp.array([True, False, True, True, False, True]))
    return Problem(loss, {"b": jnp.float32(0.3), "w": draw(20, 3)}, args)


@zero(CASES, {"threshold": ("comparison",)})
def threshold_of_a_gate():
    def loss(params, x):
        gate = x > params["threshold"]  # blame
        kept = jnp.where(gate, x * params["gain"], 0.0)
        return jnp.sum(kept**2)

    params = {"gain": jnp.float32(2.0), "threshold": jnp.float32(0.1)}
    return Problem(loss, params, (draw(21, 5),))


@zero(CASES, {"width": ("integer cast",)})
def bins_of_a_histogram():
    def loss(params, x):
        bins = (x / params["width"]).astype(int)  # blame
        return jnp.sum(params["heights"][bins] ** 2)

    params = {"heights": draw(22, 6), "width": jnp.float32(0.25)}
    return Problem(loss, params, (jnp.array([0.1, 0.4, 1.2, 0.8]),))


@zero(CASES, {"length": ("integer cast",)})
def length_as_an_integer():
    def loss(params, x):
        count = params["length"].astype(jnp.int32)  # blame
        kept = jnp.arange(len(x)) < count
        return jnp.sum(jnp.where(kept, x, 0.0) * params["w"]) ** 2

    params = {"length": jnp.float32(2.7), "w": draw(23, 4)}
    return Problem(loss, params, (draw(24, 4),))


# Flat and saturated functions


@zero(CASES, {"w1": ("flat",), "b1": ("flat",), "w2": ("zero factor", "flat")})
def dead_relu_layer():
    def loss(params, x, y):
        h = x @ params["w1"] + params["b1"]
        h = jax.nn.relu(h)  # blame: w1, b1 # or: w2
        out = h @ params["w2"] + params["b2"]  # blame: w2
        return jnp.mean((out - y) ** 2)

    params = {"w1": draw(25, 3, 4), "b1": jnp.full(4, -50.0)}
    params |= {"w2": draw(26, 4), "b2": jnp.float32(0.0)}
    return Problem(loss, params, (draw(27, 5, 3), draw(28, 5)))


@zero(CASES, {"shade": ("flat",)})
def clipped_outside_the_range():
    def loss(params, x):
        pixel = jnp.clip(x + params["shade"], 0.0, 1.0)  # blame
        return jnp.mean((pixel * params["gain"] - 0.5) ** 2)

    params = {"gain": jnp.float32(0.7), "shade": jnp.float32(9.0)}
    return Problem(loss, params, (draw(29, 4),))


@zero(CASES, {"w": ("maximum's loser", "flat")})
def clipped_policy_ratio():
    """PPO: the clipped ratio is flat, and the other one loses the minimum."""

    def loss(params, x, old, advantage):
        ratio = jnp.exp(x * params["w"] - old)
        clipped = jnp.clip(ratio, 0.8, 1.2)  # blame
        gain = jnp.minimum(ratio * advantage, clipped * advantage)  # blame
        return -jnp.mean(gain) + params["b"] ** 2

    params = {"b": jnp.float32(0.2), "w": jnp.float32(2.0)}
    return Problem(loss, params, (jnp.ones(3), jnp.zeros(3), jnp.ones(3)))


@zero(CASES, {"low": ("maximum's loser",)})
def loser_of_a_maximum():
    def loss(params, x):
        high = jnp.cosh(x * params["high"]) + 1
        low = jnp.tanh(x * params["low"])
        return jnp.sum(jnp.maximum(high, low))  # blame

    params = {"high": jnp.float32(1.0), "low": jnp.float32(0.7)}
    return Problem(loss, params, (draw(30, 4),))


@zero(CASES, {"experts[1]": ("maximum's loser",)})
def loser_of_a_reduction():
    def loss(params, x):
        scores = jnp.stack([x @ expert for expert in params["experts"]])
        best = jnp.max(scores, axis=0)  # blame
        return jnp.sum((best - 1) ** 2)

    experts = [jnp.array([1.0, 2.0]), jnp.array([0.5, 0.1]), jnp.array([2.0, 0.2])]
    x = jnp.array([[1.0, 2.0], [3.0, 0.3], [0.5, 1.0]])
    return Problem(loss, {"experts": experts}, (x,))


@zero(CASES, {"gate": ("saturation",)})
def saturated_sigmoid():
    def loss(params, x):
        gate = jax.nn.sigmoid(x * params["gate"])  # blame
        return jnp.sum((gate * params["w"] - 0.3) ** 2)

    params = {"gate": jnp.float32(60.0), "w": jnp.float32(2.0)}
    return Problem(loss, params, (jnp.array([1.0, 2.0, 0.5]),))


@zero(CASES, {"u": ("saturation",)})
def saturated_tanh_inside_a_scan():
    def loss(params, xs):
        def step(h, x):
            h = jnp.tanh(params["u"] * (x + h))  # blame
            return h, h * params["out"]

        _, ys = lax.scan(step, jnp.float32(0.0), xs)
        return jnp.sum((ys - 0.2) ** 2)

    params = {"out": jnp.float32(0.6), "u": jnp.float32(40.0)}
    return Problem(loss, params, (jnp.array([1.0, 3.0, 2.0]),))


@zero(CASES, {"scale": ("underflow",)})
def kernel_that_underflows():
    def loss(params, gaps):
        kernel = jnp.exp(-(gaps**2) * params["scale"])  # blame
        return jnp.sum(kernel) + (params["noise"] - 1) ** 2

    params = {"noise": jnp.float32(0.1), "scale": jnp.float32(50.0)}
    return Problem(loss, params, (jnp.array([3.0, 4.0, 5.0]),))


@zero(CASES, {"w": ("underflow",)})
def float16_cotangent_that_underflows():
    def loss(params, x):
        h = params["w"] * jnp.float16(1e-4)  # blame
        return jnp.sum(h * x) + params["b"]

    params = {"b": jnp.float16(1.0), "w": jnp.ones(2, jnp.float16)}
    return Problem(loss, params, (jnp.full(2, 1e-5, jnp.float16),))


# Branches


@zero(CASES, {"steep": ("branch not taken",)})
def other_branch_of_where():
    def loss(params, x):
        near = params["gentle"] * x**2
        far = params["steep"] * jnp.abs(x)
        return jnp.sum(jnp.where(jnp.abs(x) < 10, near, far))  # blame

    params = {"gentle": jnp.float32(0.5), "steep": jnp.float32(2.0)}
    return Problem(loss, params, (draw(31, 5),))


@zero(CASES, {"cold": ("branch not taken",)})
def other_branch_of_cond():
    def loss(params, x, hot):
        def warm(x):
            return jnp.sum(x * params["warm"])

        def cool(x):
            return jnp.sum(x**2 * params["cold"])

        return lax.cond(hot, warm, cool, x) ** 2  # blame

    params = {"cold": jnp.float32(1.0), "warm": jnp.float32(2.0)}
    return Problem(loss, params, (draw(32, 3), jnp.asarray(True)))


@zero(CASES, {"experts[0]": ("branch not taken",), "experts[2]": ("branch not taken",)})
def experts_of_a_switch():
    def loss(params, x, which):
        first, second, third = params["experts"]
        branches = [
            lambda x: jnp.tanh(x @ first),
            lambda x: jnp.sin(x @ second),
            lambda x: x @ third,
        ]
        h = lax.switch(which, branches, x)  # blame
        return jnp.sum(h**2)

    params = {"experts": [draw(33, 2, 2), draw(34, 2, 2), draw(35, 2, 2)]}
    return Problem(loss, params, (draw(36, 3, 2), jnp.asarray(1)))
