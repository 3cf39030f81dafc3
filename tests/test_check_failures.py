"""Cases on which `check_gradient` once gave the wrong verdict; each stays here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxgrad
from jaxgrad import check_gradient


def draw(seed, *shape):
    numbers = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(numbers, jnp.float32)


# Right gradients that were called something else


def newton_root(a):
    """x with x**3 + x = a, under vmap: a loop whose test has an entry per row."""

    def solve(f, x):
        return lax.while_loop(
            lambda x: jnp.abs(f(x)) > 1e-6, lambda x: x - f(x) / (3 * x**2 + 1), x
        )

    def tangent(g, y):
        return y / g(1.0)

    return lax.custom_root(lambda x: x**3 + x - a, jnp.zeros_like(a), solve, tangent)


def bias_before_batch_norm(p, x):
    h = x @ p["w"] + p["b"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    return jnp.mean((jax.nn.relu(h) @ p["o"]) ** 2)


def bias_of_a_key(p, x):
    scores = (x @ p["q"]) @ (x @ p["k"] + p["b"]).T
    return jnp.mean((jax.nn.softmax(scores) @ x) ** 2)


def saturated(p, x):
    return -jnp.mean(jax.nn.log_softmax(x @ p)[:, 0])


def fixed_point(function, start):
    """Iterates to a tolerance of 1e-4, far above float64's rounding."""
    moved = lax.while_loop(
        lambda s: jnp.max(jnp.abs(s[0] - s[1])) > 1e-4,
        lambda s: (function(s[0]), s[0]),
        (function(start), start),
    )
    return moved[0]


def layer(z, p, x):
    return jnp.tanh(0.5 * (p["w"] @ z) + p["u"] @ x)


@jax.custom_vjp
def equilibrium(p, x):
    return fixed_point(lambda z: layer(z, p, x), jnp.zeros(6))


def equilibrium_backward(saved, g):
    p, x, z = saved
    pull = jax.vjp(lambda z: layer(z, p, x), z)[1]
    u = fixed_point(lambda u: pull(u)[0] + g, jnp.zeros(6))
    return jax.vjp(lambda p, x: layer(z, p, x), p, x)[1](u)


def equilibrium_forward(p, x):
    z = equilibrium(p, x)
    return z, (p, x, z)


equilibrium.defvjp(equilibrium_forward, equilibrium_backward)


@jax.custom_jvp
def bisected(y):
    """x with x + tanh(x) = y, in steps of a power of 2."""

    def halve(ends):
        low, high = ends
        middle = (low + high) / 2
        up = middle + jnp.tanh(middle) < y
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    ends = -10.0 + 0 * y, 10.0 + 0 * y
    return sum(lax.while_loop(lambda e: e[1] - e[0] > 1e-6, halve, ends)) / 2


@bisected.defjvp
def bisected_jvp(primals, tangents):
    x = bisected(primals[0])
    return x, tangents[0] / (2 - jnp.tanh(x) ** 2)


def padded_tokens(p, x):
    """Rows of zeros and biases of zero: 80 kinks, convex ones and concave ones."""
    h = jax.nn.relu(x @ p["w"] + p["b"])
    return jnp.mean((h.sum(1) @ p["o"]) ** 2)


def maxout(p, x):
    return jnp.mean(jnp.max((x @ p["w"]).reshape(9, 5, 2), -1) * p["o"])


NORMED = draw(0, 6, 6) / jnp.linalg.norm(draw(0, 6, 6), 2)
RIGHT = {
    "a root under vmap": (
        lambda p: jnp.sum(jax.vmap(newton_root)(p) ** 2),
        jnp.array([0.5, 2.0]),
    ),
    "exp1": (
        lambda p: jnp.sum(jax.scipy.special.exp1(p)),
        jnp.array([0.5, 2.0]),
    ),
    "a bias before a batch norm": (
        bias_before_batch_norm,
        {"w": draw(0, 20, 8), "b": 0.1 * draw(3, 8), "o": draw(1, 8, 2)},
        draw(2, 64, 20),
    ),
    "the bias of a key": (
        bias_of_a_key,
        {"q": draw(0, 4, 4), "k": draw(1, 4, 4), "b": draw(2, 4)},
        draw(4, 6, 4),
    ),
    "a loss of exactly 0": (
        saturated,
        jnp.zeros((40, 30)).at[:, 0].set(4.0) + 0.1 * draw(0, 40, 30),
        jnp.abs(draw(1, 9, 40)),
    ),
    "a saturated softmax": (
        saturated,
        jnp.zeros((4, 3)).at[:, 0].set(40.0),
        jnp.abs(draw(1, 9, 4)) + 0.3,
    ),
    "an equilibrium to a tolerance": (
        lambda p, x: jnp.sum(equilibrium(p, x) ** 2 * jnp.arange(1.0, 7)),
        {"w": NORMED, "u": draw(1, 6, 3)},
        draw(2, 3),
    ),
    "a bisection": (lambda p: bisected(p) ** 2, jnp.array(1.3)),
    "an offset inside a logarithm": (
        lambda p, x: jnp.log(jnp.exp(25.0) + jnp.mean((x @ p) ** 2)),
        draw(0, 4),
        draw(1, 9, 4),
    ),
    "kinks of both signs": (
        padded_tokens,
        {"w": draw(0, 8, 80), "b": jnp.zeros(80), "o": draw(1, 80, 1)},
        draw(2, 4, 5, 8).at[:, 3:].set(0.0),
    ),
    "40 kinks": (maxout, {"w": jnp.zeros((4, 10)), "o": draw(0, 5)}, draw(1, 9, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right(name):
    check = check_gradient(*RIGHT[name])
    assert check, check
    assert {leaf.verdict for leaf in check.leaves} <= {"right", "kink"}, check
    assert check.forward_mode != "differs"


def test_an_optimum_in_float64():
    with jax.enable_x64(True):
        x, y = np.asarray(draw(0, 50, 4), float), np.asarray(draw(1, 50), float)
        best = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0])
        assert check_gradient(lambda p: jnp.mean((x @ p - y) ** 2), best)
        # Rounding lands elsewhere on another processor, or with other data.
        for seed in range(2, 12):
            x, y = np.asarray(draw(seed, 50, 4), float), np.asarray(draw(1, 50), float)
            best = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0])
            check = check_gradient(
                lambda p, x, y: jnp.mean((x @ p - y) ** 2), best, x, y
            )
            assert check, check


def test_numpy_numbers_are_what_jax_makes_of_them():
    weight = np.random.default_rng(0).normal(size=(4, 5))
    check = check_gradient(lambda p: jnp.mean(jnp.tanh(draw(1, 9, 4) @ p)), weight)
    assert (check.leaves[0].verdict, check.leaves[0].dtype) == ("right", "float32")


def test_the_edge_of_a_domain_warns_of_nothing():
    check = check_gradient(lambda p: jnp.sum(p**1.5), jnp.array([0.0, 1.0]))
    assert check.leaves[0].verdict in ("right", "undecided")


def test_a_trusted_rule_has_a_second_order():
    rounded = jax.custom_vjp(lambda x: jnp.round(x))
    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def loss(p):
        return jnp.sum(jnp.tanh(rounded(p["a"]) @ p["b"]) ** 2)

    params = {"a": 2 * draw(0, 6, 6), "b": draw(1, 6, 6)}
    assert check_gradient(loss, params, trust=[rounded], order=2)


# Wrong gradients that passed


def scaled(change):
    """The identity, with a rule that changes its gradient."""
    rule = jax.custom_vjp(lambda w: w * 1.0)
    rule.defvjp(lambda w: (w * 1.0, None), lambda _, g: (change(g),))
    return rule


@pytest.mark.parametrize("place", range(5))
def test_an_entry_beside_others_of_other_sizes(place):
    scales = jnp.array([1e8, 1e4, 1.0, 1e-4, 1e-8])
    wrong = scaled(lambda g: g.at[place].multiply(1.5))
    weight = jnp.array([1e-8, -2e-4, 0.7, 1.3e4, 1.1e8])
    check = check_gradient(lambda w: jnp.sum(jnp.sin(wrong(w) * scales)), weight)
    (leaf,) = check.leaves
    assert leaf.verdict == "wrong"
    assert [entry.index for entry in leaf.entries] == [(place,)]


@pytest.mark.parametrize("factor", [1.5, 1.01, -1.0])
@pytest.mark.parametrize("size", [72, 800])
def test_a_factor_of_a_leaf_that_is_not_small(size, factor):
    wrong = scaled(lambda g: g * factor)
    check = check_gradient(lambda w: jnp.sum(jnp.sin(wrong(w))), draw(0, size))
    assert check.leaves[0].verdict == "wrong"
    assert check.rules[0].verdict == "wrong"


def test_five_entries_where_jax_has_no_gradient_of_its_own():
    places = (5, 12345, 20000, 33333, 49999)

    @jax.custom_vjp
    def settled(w):
        def step(state):
            return state[0] + 1, 0.5 * state[1] + 0.3 * jnp.sin(w)

        state = lax.while_loop(lambda s: s[0] < 5, step, (0, jnp.zeros_like(w)))
        return state[1]

    def backward(w, g):
        gain = sum(0.3 * 0.5**k for k in range(5))
        return (
            gain * jnp.cos(w) * g * jnp.ones_like(w).at[jnp.array(places)].set(1.5),
        )

    settled.defvjp(lambda w: (settled(w), w), backward)
    weights = jnp.linspace(0.5, 1, 50000)
    check = check_gradient(
        lambda w: jnp.sum(jnp.tanh(settled(w)) ** 2 * weights), draw(0, 50000)
    )
    (leaf,) = check.leaves
    assert leaf.wrong_entries == 5
    assert sorted(entry.index[0] for entry in leaf.entries) == list(places)


@pytest.mark.parametrize("offset", [1e-3, 0.1])
def test_a_forward_part_that_returns_something_else(offset):
    cube = jax.custom_vjp(lambda x: x**3)
    cube.defvjp(lambda x: (x**3 + offset, x), lambda x, g: (3 * x**2 * g,))
    check = check_gradient(lambda p: jnp.sum(cube(p)), draw(0, 8, 8))
    assert not check
    assert check.leaves[0].verdict == "right"
    assert check.rules[0].verdict == "wrong"
    assert "forward part" in check.rules[0].text
    assert {finding.kind for finding in check.findings} == {"value"}


def test_a_module_of_gradients_is_no_function():
    import equinox as eqx

    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))

    def loss(model):
        return jnp.mean(jax.vmap(model)(draw(0, 8, 3)) ** 2)

    gradient = eqx.filter_grad(loss)(model)
    assert jaxgrad.check_gradient(loss, model, gradient=gradient)
