"""Tests `check_gradient`: its verdicts, what they name, its report, what it refuses."""

import dataclasses
import functools
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

import jaxgrad
from jaxgrad import assert_gradient, check_gradient


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = draw(0, 8, 5), draw(1, 8, 5)
PARAMS = {"v": draw(2, 5, 5), "w": draw(3, 5, 5), "b": draw(4, 5)}


def layers_loss(p, x, y):
    return jnp.mean((jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] - y) ** 2)


def with_rule(function, change):
    """`function`, with a rule that changes the gradient of its first operand."""
    rule = jax.custom_vjp(function)

    def forward(*operands):
        return function(*operands), operands

    def backward(operands, cotangent):
        first, *rest = jax.vjp(function, *operands)[1](cotangent)
        return change(first), *rest

    rule.defvjp(forward, backward)
    return rule


def square(x):
    return x**2


def halved(g):
    return g / 2


wrong_square = with_rule(square, halved)


def verdicts(check):
    return {leaf.path: leaf.verdict for leaf in check.leaves}


def leaf_of(check, path):
    (leaf,) = [leaf for leaf in check.leaves if leaf.path == path]
    return leaf


def place_of(function):
    code = inspect.unwrap(function).__code__
    return function.__name__, Path(code.co_filename).name, code.co_firstlineno


def wrong_rules(check):
    return [
        (rule.function, Path(rule.file).name, rule.line)
        for rule in check.rules
        if rule.verdict == "wrong"
    ]


def plain(check):
    """A report's facts, without the time it took."""
    data = check.to_dict()
    data.pop("seconds")
    return data


# Right, and wrong


def test_a_right_gradient():
    check = check_gradient(layers_loss, PARAMS, X, Y)
    assert check.ok
    assert verdicts(check) == {"b": "right", "v": "right", "w": "right"}
    for leaf in check.leaves:
        assert leaf.shape == PARAMS[leaf.path].shape
        assert leaf.dtype == "float32"
        assert leaf.relative_error < 1e-8  # the rule's, in float64
        assert 5 < leaf.digits < 9
        assert (leaf.entries, leaf.cause, leaf.held) == ((), None, "")
    assert (check.rules, check.findings, check.second_order) == ((), (), None)


def test_a_wrong_rule():
    params = {"a": draw(0, 3), "x": draw(1, 4)}
    check = check_gradient(
        lambda p: jnp.sum(p["a"]) + jnp.sum(wrong_square(p["x"])), params
    )
    assert not check.ok
    assert verdicts(check) == {"a": "right", "x": "wrong"}
    leaf = leaf_of(check, "x")
    assert leaf.relative_error == pytest.approx(0.5)
    assert (leaf.cause.kind, leaf.wrong_entries) == ("factor", 4)
    assert wrong_rules(check) == [place_of(square)]
    for entry in leaf.entries:
        right = 2 * float(params["x"][entry.index])
        assert entry.reference == pytest.approx(right, abs=entry.uncertainty)
        assert entry.claimed == pytest.approx(right / 2)
    assert {entry.index for entry in leaf.entries} == {(0,), (1,), (2,), (3,)}


@given(
    factor=st.floats(-3, 3) | st.sampled_from([1.0, 1 + 1e-3, 1 - 1e-3, 1 + 1e-5]),
    shape=st.lists(st.integers(1, 3), max_size=3),
)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
def test_a_factor_is_wrong_beyond_rtol(factor, shape):
    if 1e-5 < abs(factor - 1) < 1e-3:
        factor = 1.0
    rule = with_rule(lambda x: x**2 + jnp.sin(x), lambda g: g * factor)
    x = draw(len(shape), *shape) + 3
    check = check_gradient(lambda p: jnp.sum(rule(p)), x)
    assert check.ok == (abs(factor - 1) <= 1e-5)
    assert check.leaves[0].verdict == ("right" if check.ok else "wrong")
    if not check.ok:
        error = check.leaves[0].relative_error
        assert error == pytest.approx(abs(factor - 1), abs=1e-6)


@pytest.mark.parametrize("size", [1, 64, 65, 2000])
def test_a_whole_leaf_that_is_wrong(size):
    """However many entries it has, of which none is worse than the others."""
    x = draw(size, size)
    for factor in (2, -1, 1.01):
        rule = with_rule(square, lambda g, factor=factor: g * factor)
        check = check_gradient(lambda p, rule=rule: jnp.sum(rule(p)), x)
        assert verdicts(check) == {"params": "wrong"}
        assert check.leaves[0].cause.kind == ("sign" if factor < 0 else "factor")
        assert wrong_rules(check) == [place_of(square)]


@pytest.mark.parametrize("change", [1.005, jnp.array([1, 1, 1.005, 1, 1])])
def test_rtol_is_the_limit(change):
    """Of a leaf and of each entry."""
    rule = with_rule(square, lambda g: g * change)
    for rtol, ok in [(1e-3, False), (4.9e-3, False), (5.1e-3, True), (1e-2, True)]:
        check = check_gradient(lambda p: jnp.sum(rule(p)), X[0], rtol=rtol)
        assert check.ok == ok, rtol


def test_no_leaf_hides_behind_anothers_size():
    rule = with_rule(jnp.sin, lambda g: g * 1.01)
    params = {"large": draw(0, 4), "small": draw(1, 4)}

    def loss(p):
        return 1e6 * jnp.sum(p["large"] ** 2) + jnp.sum(rule(p["small"]))

    check = check_gradient(loss, params)
    assert verdicts(check) == {"large": "right", "small": "wrong"}
    assert leaf_of(check, "small").relative_error == pytest.approx(0.01)
    sizes = {"tiny": 1e-8 * draw(2, 3), "one": draw(3, 3), "huge": 1e8 * draw(4, 3)}

    def each(p, rule):
        return sum(jnp.sum(rule(p[name] / size)) for name, size in SIZES.items())

    assert check_gradient(each, sizes, jnp.sin).ok
    check = check_gradient(each, sizes, rule)
    assert verdicts(check) == dict.fromkeys(sizes, "wrong")


SIZES = {"tiny": 1e-8, "one": 1.0, "huge": 1e8}


# Which entry


def one_off(gradient):
    return gradient.at[7, 321].add(1.0)


MANY = draw(5, 100, 1000)


def steep(x):
    return jnp.sum(jnp.sin(x) * x)


def steep_in_a_loop(x):
    """The same; JAX can't differentiate it by itself."""
    return jax.lax.while_loop(
        lambda state: state[0] < 1, lambda state: (state[0] + 1, steep(x)), (0, 0.0)
    )[1]


def rule_of_the_loop():
    rule = jax.custom_vjp(steep_in_a_loop)
    rule.defvjp(
        lambda x: (steep_in_a_loop(x), x),
        lambda x, ct: (one_off(ct * jax.grad(steep)(x)),),
    )
    return rule


ROADS = {
    "a rule": lambda: check_gradient(with_rule(steep, one_off), MANY),
    "a rule that JAX can't open": lambda: check_gradient(rule_of_the_loop(), MANY),
    "a function": lambda: check_gradient(
        steep, MANY, gradient=lambda x: one_off(jax.grad(steep)(x))
    ),
    "values": lambda: check_gradient(
        steep, MANY, gradient=one_off(jax.grad(steep)(MANY))
    ),
}


@pytest.mark.parametrize("road", ROADS)
def test_one_wrong_entry_among_a_hundred_thousand(road):
    check = ROADS[road]()
    (leaf,) = check.leaves
    assert (leaf.verdict, leaf.wrong_entries) == ("wrong", 1)
    (entry,) = leaf.entries
    x = float(MANY[7, 321])
    right = math.cos(x) * x + math.sin(x)
    assert entry.index == (7, 321)
    assert entry.claimed == pytest.approx(right + 1, rel=1e-6)
    assert abs(entry.reference - right) <= max(entry.uncertainty, 1e-9)
    assert entry.uncertainty < 1e-4
    assert leaf.cause.kind == "entries"
    assert "[7, 321]" in leaf.cause.text
    assert check.evaluations < 5000


def test_three_wrong_entries_among_ten_thousand():
    places = ((0, 0), (50, 3), (99, 99))
    rows, columns = np.array(places).T
    x = draw(6, 100, 100)
    right = jax.grad(steep)(x)
    check = check_gradient(steep, x, gradient=right.at[rows, columns].multiply(1.5))
    (leaf,) = check.leaves
    assert {entry.index for entry in leaf.entries} == set(places)
    assert leaf.wrong_entries == 3
    errors = [abs(entry.claimed - entry.reference) for entry in leaf.entries]
    assert errors == sorted(errors, reverse=True)


# Which rule


def inner(x, w):
    return jnp.tanh(x @ w)


def test_a_rule_inside_jit_vmap_and_scan():
    rule = with_rule(inner, lambda g: -g)

    @jax.jit
    def loss(p, xs):
        def step(h, x):
            return jax.vmap(rule, (0, None))(h, p["w"]) + x, None

        h, _ = jax.lax.scan(step, p["h"], xs)
        return jnp.mean(h**2)

    params = {"h": draw(0, 3, 4), "w": draw(1, 4, 4)}
    check = check_gradient(loss, params, draw(2, 5, 3, 4))
    assert not check.ok
    assert leaf_of(check, "h").verdict == "wrong"
    assert wrong_rules(check) == [place_of(inner)]
    (rule,) = check.rules
    assert (rule.operand, rule.cause.kind) == (0, "sign")
    assert rule.relative_error == pytest.approx(2)
    assert place_of(inner)[0] in leaf_of(check, "h").cause.text


def test_a_wrong_custom_jvp():
    @jax.custom_jvp
    def softplus(x):
        return jnp.log1p(jnp.exp(x))

    @softplus.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        return softplus(x), t * jax.nn.sigmoid(x) * 0.9

    check = check_gradient(lambda p: jnp.sum(softplus(p)), X[0])
    assert verdicts(check) == {"params": "wrong"}
    assert wrong_rules(check) == [place_of(softplus)]
    assert check.rules[0].relative_error == pytest.approx(0.1)


def test_a_forward_part_that_returns_something_else():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3 + 1, x), lambda x, ct: (ct * 3 * x**2,))
    check = check_gradient(lambda p: jnp.sum(cube(p)), X[0])
    assert not check.ok
    assert wrong_rules(check) == [place_of(cube)]
    assert "forward part" in check.rules[0].text
    assert "forward part" in str(check)


def test_only_the_rule_at_fault_is_accused():
    right, wrong = with_rule(square, lambda g: g), with_rule(inner, halved)

    def loss(p):
        return jnp.sum(right(wrong(p["x"], p["w"])))

    check = check_gradient(loss, {"x": X, "w": PARAMS["w"]})
    assert verdicts(check) == {"x": "wrong", "w": "right"}
    assert wrong_rules(check) == [place_of(inner)]
    assert sorted(rule.verdict for rule in check.rules) == ["right", "wrong"]


def test_a_rule_with_static_operands():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def mapped(function, x):
        return function(x)

    def backward(function, x, ct):
        return (2 * ct * jax.vmap(jax.grad(function))(x),)

    mapped.defvjp(lambda function, x: (function(x), x), backward)
    check = check_gradient(lambda p: jnp.sum(mapped(jnp.sin, p)), X[0])
    assert verdicts(check) == {"params": "wrong"}
    assert wrong_rules(check) == [place_of(mapped)]


def grow(x):
    return 1.5 * x


def seldom_wrong():
    """A rule that is wrong near one value."""
    rule = jax.custom_vjp(grow)

    def backward(x, ct):
        return (jnp.where(jnp.abs(x - 1.5**7) < 0.1, 2, 1.5) * ct,)

    rule.defvjp(lambda x: (grow(x), x), backward)
    return rule


def grown_in_a_loop(p, rule):
    return jax.lax.scan(lambda x, _: (rule(x), None), p, None, length=10)[0]


def grown_at_ten_places(p, rule):
    return sum(rule(p * 1.5**k) for k in range(10))


@pytest.mark.parametrize("loss", [grown_in_a_loop, grown_at_ten_places])
def test_a_rule_that_is_wrong_in_one_of_its_calls(loss):
    check = check_gradient(loss, 1.0, seldom_wrong())
    assert verdicts(check) == {"params": "wrong"}
    assert wrong_rules(check) == [place_of(grow)]


# How: the mistakes that people make, by hand


def by_hand(p, x, y):
    """The right gradient of `layers_loss`, as one writes it on paper."""
    h = jnp.tanh(x @ p["w"] + p["b"])
    e = 2 * (h @ p["v"] - y) / y.size
    d = (e @ p["v"].T) * (1 - h**2)
    return {"v": h.T @ e, "w": x.T @ d, "b": jnp.sum(d, 0)}


def changed(**changes):
    def gradient(p, x, y):
        right = by_hand(p, x, y)
        return right | {name: change(right) for name, change in changes.items()}

    return gradient


def of_half_the_batch(p, x, y):
    return jax.tree.map(halved, by_hand(p, x[:4], y[:4]))


MISTAKES = {
    "forgot the square's 2": (changed(w=lambda g: g["w"] / 2), {"w": "factor"}),
    "twice": (changed(v=lambda g: g["v"] * 2), {"v": "factor"}),
    "a sum for the mean": (changed(b=lambda g: g["b"] * 8), {"b": "factor"}),
    "the mean for a sum": (changed(b=lambda g: g["b"] / 8), {"b": "factor"}),
    "half a percent": (changed(w=lambda g: g["w"] * 1.005), {"w": "factor"}),
    "uphill": (
        lambda p, x, y: jax.tree.map(jnp.negative, by_hand(p, x, y)),
        dict.fromkeys(PARAMS, "sign"),
    ),
    "forgot the bias": (changed(b=lambda g: 0 * g["b"]), {"b": "zero"}),
    "not transposed": (changed(v=lambda g: g["v"].T), {"v": "transposed"}),
    "rolled": (changed(w=lambda g: jnp.roll(g["w"], 1, 1)), {"w": "permuted"}),
    "swapped": (
        changed(v=lambda g: g["w"], w=lambda g: g["v"]),
        {"v": "swapped", "w": "swapped"},
    ),
    "scaled rows": (
        changed(w=lambda g: g["w"] * jnp.arange(1.0, 6)[:, None]),
        {"w": "rows"},
    ),
    "a scaled column": (
        changed(w=lambda g: g["w"].at[:, 2].multiply(3)),
        {"w": "columns"},
    ),
    "some entries": (
        changed(w=lambda g: g["w"].at[1, 2].add(1).at[4, 0].add(2)),
        {"w": "entries"},
    ),
    "an offset": (changed(v=lambda g: g["v"] + 0.01), {"v": "offset"}),
    "half of the batch": (of_half_the_batch, dict.fromkeys(PARAMS, "missing_term")),
    "noise": (changed(w=lambda g: draw(9, 5, 5)), {"w": "unknown"}),
}


def test_the_gradient_by_hand_is_right():
    assert check_gradient(layers_loss, PARAMS, X, Y, gradient=by_hand).ok


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_cause_of_a_mistake(mistake):
    gradient, causes = MISTAKES[mistake]
    check = check_gradient(layers_loss, PARAMS, X, Y, gradient=gradient)
    assert not check.ok
    wrong = {x.path: x.cause.kind for x in check.leaves if x.verdict == "wrong"}
    assert wrong == causes
    assert all(leaf.verdict in ("right", "wrong") for leaf in check.leaves)
    for path in causes:
        assert f"`{path}`" in leaf_of(check, path).cause.text


def test_a_factor_has_a_name():
    check = check_gradient(
        layers_loss, PARAMS, X, Y, gradient=MISTAKES["a sum for the mean"][0]
    )
    text = leaf_of(check, "b").cause.text
    assert "8 times too large" in text
    assert "batch size" in text
    check = check_gradient(
        layers_loss, PARAMS, X, Y, gradient=MISTAKES["forgot the square's 2"][0]
    )
    assert "2 times too small" in leaf_of(check, "w").cause.text


def test_a_forgotten_regulariser():
    def loss(p, x, y):
        return layers_loss(p, x, y) + 0.1 * jnp.sum(p["w"] ** 2)

    check = check_gradient(loss, PARAMS, X, Y, gradient=by_hand)
    assert verdicts(check) == {"b": "right", "v": "right", "w": "wrong"}
    assert leaf_of(check, "w").cause.kind == "missing_term"


# The other verdicts


def cancelling_variance(x):
    return jnp.mean(x**2) - jnp.mean(x) ** 2


def test_imprecise():
    check = check_gradient(cancelling_variance, 1e4 + draw(0, 20))
    (leaf,) = check.leaves
    assert (check.ok, leaf.verdict) == (True, "imprecise")
    assert leaf.relative_error < 1e-4
    assert leaf.digits < 3.5
    assert "digits" in leaf.text
    assert "float32" in leaf.text
    exact = check_gradient(lambda x: jnp.var(x), draw(0, 20))
    assert verdicts(exact) == {"params": "right"}


def test_where_digits_are_lost():
    check = check_gradient(cancelling_variance, 1e4 + draw(0, 20))
    assert "test_checking.py, line" in str(check)


def test_kink():
    x = jnp.array([0.0, 1.0, -2.0])
    check = check_gradient(lambda p: jnp.sum(3 * jax.nn.relu(p)), x)
    (leaf,) = check.leaves
    assert (check.ok, leaf.verdict) == (True, "kink")
    assert leaf.one_sided == pytest.approx((0, 3))
    assert leaf.entries[0].index == (0,)
    assert "one-sided" in leaf.text
    beside = check_gradient(lambda p: jnp.sum(3 * jax.nn.relu(p)), x + 1e-4)
    assert verdicts(beside) == {"params": "right"}


@pytest.mark.parametrize(
    ("claim", "verdict"), [(-0.9, "kink"), (0.0, "kink"), (1.5, "wrong")]
)
def test_on_a_kink_the_gradient_must_lie_between(claim, verdict):
    check = check_gradient(
        lambda p: jnp.sum(jnp.abs(p)), jnp.zeros(1), gradient=jnp.array([claim])
    )
    assert verdicts(check) == {"params": verdict}


def test_nonfinite():
    def loss(p):  # the road not taken divides by zero
        return jnp.sum(jnp.where(p["x"] > 0, jnp.sqrt(p["x"]), 0.0)) + p["y"]

    check = check_gradient(loss, {"x": jnp.array([1.0, 0.0]), "y": jnp.array(1.0)})
    assert not check.ok
    assert verdicts(check) == {"x": "nonfinite", "y": "right"}
    leaf = leaf_of(check, "x")
    assert (leaf.entries[0].index, leaf.wrong_entries) == ((1,), 1)
    assert math.isnan(leaf.entries[0].claimed)


def test_nonfinite_only_in_its_own_dtype():
    x = jnp.asarray([300.0, 1.0], jnp.float16)
    check = check_gradient(lambda p: jnp.sum((p * p) * (p * 1e-3)), x)
    (leaf,) = check.leaves
    assert leaf.verdict == "nonfinite"
    assert "float16 overflows" in leaf.text
    assert leaf.entries[0].reference == pytest.approx(270, rel=1e-3)


def test_integers_are_not_differentiable():
    params = {"n": jnp.arange(3), "on": jnp.array([True]), "x": X[0]}
    check = check_gradient(lambda p: jnp.sum(p["x"] ** 2) * p["n"][1], params)
    assert check.ok
    assert verdicts(check) == {
        "n": "not_differentiable",
        "on": "not_differentiable",
        "x": "right",
    }
    assert leaf_of(check, "n").dtype == "int32"


def test_undecided():
    check = check_gradient(coarse, POINT)
    assert not check.ok
    assert verdicts(check) == {"x": "right", "y": "undecided"}
    assert "give or take" in leaf_of(check, "y").text
    assert "give or take" in str(check)


POINT = {"x": jnp.array([1.3]), "y": jnp.array([0.7])}


def coarse(p):
    """Jumps along y wherever a bit of it does, so that no slope shows."""
    bits = jax.lax.bitcast_convert_type(p["y"][0], jnp.int32)
    return p["x"][0] ** 2 + p["y"][0] + jnp.sin(1e3 * (bits % 1000))


def test_a_step_that_rounding_swallows_shows_no_slope_of_zero():
    check = check_gradient(lambda p: jnp.sin(p + 1e12), 0.7)
    assert check.leaves[0].verdict in ("undecided", "imprecise")


def test_a_gradient_of_zero_and_an_empty_leaf():
    params = {"x": X[0], "unused": Y[0], "none": jnp.zeros((0, 3))}
    check = check_gradient(lambda p: jnp.sum(p["x"] ** 2), params)
    assert verdicts(check) == dict.fromkeys(("none", "unused", "x"), "right")

    def claim(p):
        return {"x": 2 * p["x"], "unused": p["unused"] + 1, "none": p["none"]}

    check = check_gradient(lambda p: jnp.sum(p["x"] ** 2), params, gradient=claim)
    assert leaf_of(check, "unused").verdict == "wrong"
    assert leaf_of(check, "x").verdict == "right"


# What is meant to differ


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))


def test_an_intended_stop_gradient():
    params = {"a": X[0], "b": Y[0]}

    def loss(p):
        target = jax.lax.stop_gradient(p["a"] * p["b"])
        return jnp.sum((p["a"] - target) ** 2) + jnp.sum(p["b"] ** 2)

    check = check_gradient(loss, params)
    assert check.ok
    assert verdicts(check) == dict.fromkeys("ab", "right")
    assert {leaf.held for leaf in check.leaves} == {"stopped"}
    assert str(check).count("right, stopped") == 2
    check = check_gradient(
        loss, params, gradient=jax.grad(lambda p: loss(p) * 1.0 + jnp.sum(p["b"]))
    )
    assert verdicts(check) == {"a": "right", "b": "wrong"}


def test_straight_through_by_stop_gradient():
    def loss(p):
        held = p["x"] + jax.lax.stop_gradient(jnp.round(p["x"]) - p["x"])
        return jnp.sum(held**2)

    check = check_gradient(loss, {"x": 3 * X[0]})
    assert verdicts(check) == {"x": "right"}
    assert check.leaves[0].held == "stopped"


def test_no_stop_is_seen_where_none_matters():
    check = check_gradient(lambda p: jnp.sum(jax.nn.softmax(p) ** 2), X[0])
    assert verdicts(check) == {"params": "right"}
    assert check.leaves[0].held == ""


def test_trust_holds_a_rule():
    def loss(p):
        return jnp.sum((rounded(3 * p["x"]) - p["y"]) ** 2)

    params = {"x": X[0], "y": Y[0]}
    doubted = check_gradient(loss, params)
    assert verdicts(doubted) == {"x": "wrong", "y": "right"}
    assert wrong_rules(doubted) == [place_of(rounded)]
    trusted = check_gradient(loss, params, trust=(rounded,))
    assert verdicts(trusted) == {"x": "right", "y": "right"}
    assert leaf_of(trusted, "x").held == "trusted"
    assert "right, trusted" in str(trusted)


def test_trust_in_one_rule_does_not_cover_another():
    def loss(p):
        return jnp.sum(wrong_square(rounded(3 * p["x"]))) + jnp.sum(p["y"] ** 2)

    check = check_gradient(loss, {"x": X[0], "y": Y[0]}, trust=(rounded,))
    assert verdicts(check) == {"x": "wrong", "y": "right"}
    assert wrong_rules(check) == [place_of(square)]


# The call's options


def test_gradient_as_values(neuron):
    params, x, y = neuron
    right = jaxgrad.LinearParams(jnp.array([[-5.0, -10.0, -15.0]]), jnp.array([-5.0]))
    check = check_gradient(jaxgrad.linear_loss, params, x, y, gradient=right)
    assert verdicts(check) == {"weight": "right", "bias": "right"}
    wrong = right._replace(bias=np.array([-2.5]))
    check = check_gradient(jaxgrad.linear_loss, params, x, y, gradient=wrong)
    assert verdicts(check) == {"weight": "right", "bias": "wrong"}
    entry = leaf_of(check, "bias").entries[0]
    assert (entry.claimed, entry.reference) == pytest.approx((-2.5, -5.0))


def test_the_gradient_that_is_given_is_what_is_checked():
    def loss(p):
        return jnp.sum(wrong_square(p))

    assert not check_gradient(loss, X[0])
    assert check_gradient(loss, X[0], gradient=lambda p: 2 * p)
    assert check_gradient(loss, X[0], gradient=2 * X[0])
    assert not check_gradient(loss, X[0], gradient=X[0])


def power_in_a_loop(p):
    """p^3, which has no reverse mode."""
    return jax.lax.while_loop(
        lambda state: state[0] < 3, lambda state: (state[0] + 1, state[1] * p), (0, 1.0)
    )[1]


@pytest.mark.parametrize("as_values", [False, True])
def test_a_gradient_by_hand_of_what_jax_cannot_differentiate(as_values):
    for factor, verdict in [(3, "right"), (2, "wrong")]:
        gradient = 4.0 * factor if as_values else lambda p, n=factor: n * p**2
        check = check_gradient(power_in_a_loop, 2.0, gradient=gradient)
        assert verdicts(check) == {"params": verdict}
        assert check.forward_mode in ("none", "agrees")


def test_values_are_judged_by_their_own_dtypes_noise():
    native = jax.grad(layers_loss)(PARAMS, X, Y)
    check = check_gradient(layers_loss, PARAMS, X, Y, gradient=native)
    assert verdicts(check) == dict.fromkeys("bvw", "right")
    coarse = jax.tree.map(lambda g: g.astype(jnp.bfloat16), native)
    check = check_gradient(layers_loss, PARAMS, X, Y, gradient=coarse)
    assert verdicts(check) == dict.fromkeys("bvw", "right")
    off = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), native)
    check = check_gradient(layers_loss, PARAMS, X, Y, gradient=off)
    assert verdicts(check) == dict.fromkeys("bvw", "wrong")


def kernel(change):
    """A Pallas kernel with a rule of its own."""

    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...] * jnp.tanh(x_ref[...])

    call = pl.pallas_call(body, jax.ShapeDtypeStruct((5,), jnp.float32), interpret=True)
    rule = jax.custom_vjp(call)

    def backward(x, ct):
        t = jnp.tanh(x)
        return (change(ct * (t + x * (1 - t**2))),)

    rule.defvjp(lambda x: (call(x), x), backward)
    return rule


def plain_kernel(p):
    return jnp.sum((p["x"] * jnp.tanh(p["x"])) ** 2) * p["y"]


@pytest.mark.parametrize("by", ["pallas", "callback"])
def test_reference_stands_for_a_kernel(by):
    def on_host(x):
        return np.asarray(x * np.tanh(x), np.float32)

    def loss(p, change):
        if by == "pallas":
            return jnp.sum(kernel(change)(p["x"]) ** 2) * p["y"]
        shape = jax.ShapeDtypeStruct((5,), jnp.float32)
        rule = jax.custom_vjp(lambda x: jax.pure_callback(on_host, shape, x))

        def backward(x, ct):
            t = jnp.tanh(x)
            return (change(ct * (t + x * (1 - t**2))),)

        rule.defvjp(lambda x: (rule.fun(x), x), backward)
        return jnp.sum(rule(p["x"]) ** 2) * p["y"]

    params = {"x": X[0], "y": jnp.array(2.0)}
    check = check_gradient(
        lambda p: loss(p, lambda g: g), params, reference=plain_kernel
    )
    assert verdicts(check) == {"x": "right", "y": "right"}
    (finding,) = check.findings
    assert finding.kind == "native"
    assert {"pallas": "pallas_call", "callback": "callback"}[by] in finding.text
    wrong = check_gradient(lambda p: loss(p, halved), params, reference=plain_kernel)
    assert verdicts(wrong) == {"x": "wrong", "y": "right"}
    assert leaf_of(wrong, "x").cause.kind == "factor"


def test_reference_has_another_value():
    def reference(p):
        return jnp.sum(p**2) + 1.0

    check = check_gradient(lambda p: jnp.sum(p**2), X[0], reference=reference)
    assert not check.ok
    assert [f.kind for f in check.findings] == ["value"]
    assert f"{float(reference(X[0])):.4g}"[:4] in check.findings[0].text


def test_reference_says_what_is_right():
    """What the loss's own values say doesn't count then."""
    check = check_gradient(
        lambda p: jnp.sum(p**2) + 0 * jnp.sum(p**3),
        X[0],
        reference=lambda p: jnp.sum(p**2),
        gradient=lambda p: 2 * p,
    )
    assert check.ok
    check = check_gradient(
        lambda p: jnp.sum(wrong_square(p)), X[0], reference=lambda p: jnp.sum(p**2)
    )
    assert verdicts(check) == {"params": "wrong"}


def test_second_order():
    check = check_gradient(layers_loss, PARAMS, X, Y, order=2)
    assert check.ok
    assert verdicts(check.second_order) == dict.fromkeys("bvw", "right")
    assert "Second order" in str(check)

    @jax.custom_vjp
    def slope(x):
        return 2 * x

    slope.defvjp(lambda x: (2 * x, None), lambda _, ct: (ct,))  # not 2 ct
    power = jax.custom_vjp(square)
    power.defvjp(lambda x: (x**2, x), lambda x, ct: (ct * slope(x),))

    def loss(p):
        return jnp.sum(power(p))

    assert check_gradient(loss, X[0]).ok
    check = check_gradient(loss, X[0], order=2)
    assert not check.ok
    assert verdicts(check) == {"params": "right"}
    assert verdicts(check.second_order) == {"params": "wrong"}
    assert check.second_order.leaves[0].cause.kind == "factor"


def test_functions_that_return_arrays():
    def function(p, x):
        return {"out": jnp.tanh(x @ p["w"]), "count": 3, "norm": jnp.sum(p["w"] ** 2)}

    assert check_gradient(function, {"w": PARAMS["w"]}, X).ok
    rule = with_rule(inner, lambda g: g.at[2, 3].add(0.1))
    check = check_gradient(lambda p: rule(*p), (PARAMS["w"], PARAMS["v"]))
    assert verdicts(check) == {"[0]": "wrong", "[1]": "right"}
    assert [entry.index for entry in check.leaves[0].entries] == [(2, 3)]


def test_no_output_hides_behind_another():
    rule = with_rule(jnp.sin, lambda g: g.at[4].multiply(1.01))
    check = check_gradient(lambda p: (jnp.cos(p), rule(p)), X[0])
    assert verdicts(check) == {"params": "wrong"}
    softmax = with_rule(lambda x: jax.nn.softmax(x), halved)  # of sum 1
    assert verdicts(check_gradient(softmax, X[0])) == {"params": "wrong"}


def test_forward_mode():
    assert check_gradient(layers_loss, PARAMS, X, Y).forward_mode == "agrees"
    rule = with_rule(square, lambda g: g)
    assert check_gradient(lambda p: jnp.sum(rule(p)), X[0]).forward_mode == "none"


def test_forward_mode_differs_from_reverse_mode():
    @jax.custom_jvp
    def double(x):
        return 2 * x

    @double.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        moved = jax.custom_derivatives.linear_call(
            lambda _, t: 2 * t, lambda _, ct: 3 * ct, (), t
        )
        return double(x), moved

    check = check_gradient(lambda p: jnp.sum(double(p)), X[0])
    assert verdicts(check) == {"params": "wrong"}
    assert check.forward_mode == "differs"
    assert "forward_mode" in [f.kind for f in check.findings]

    @jax.custom_jvp
    def triple(x):
        return 3 * x

    @triple.defjvp
    def _(primals, tangents):
        moved = jax.custom_derivatives.linear_call(
            lambda _, t: 2 * t, lambda _, ct: 3 * ct, (), tangents[0]
        )
        return triple(primals[0]), moved

    check = check_gradient(lambda p: jnp.sum(triple(p)), X[0])
    assert verdicts(check) == {"params": "right"}
    assert check.forward_mode == "differs"


def test_leaves_are_chosen_by_their_paths():
    params = {"layers": [{"w": X[0], "b": Y[0]}, {"w": X[1], "b": Y[1]}]}

    def loss(p):
        return sum(
            jnp.sum(layer["w"] ** 2) + jnp.sum(wrong_square(layer["b"]))
            for layer in p["layers"]
        )

    def chosen(leaves):
        return verdicts(check_gradient(loss, params, leaves=leaves))

    assert chosen("layers[*].w") == {"layers[0].w": "right", "layers[1].w": "right"}
    assert chosen(["layers[1].*"]) == {"layers[1].b": "wrong", "layers[1].w": "right"}
    assert chosen(("layers[0].b", "layers[1].w")) == {
        "layers[0].b": "wrong",
        "layers[1].w": "right",
    }
    assert check_gradient(loss, params, leaves="*.w").ok


def test_has_aux():
    def loss(p, x, y):
        return layers_loss(p, x, y), {"seen": x, "count": 3}

    check = check_gradient(loss, PARAMS, X, Y, has_aux=True)
    assert verdicts(check) == dict.fromkeys("bvw", "right")


def test_key_chooses_the_directions():
    checks = [
        check_gradient(layers_loss, PARAMS, X, Y, key=key)
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    ]
    assert all(check.ok for check in checks)
    errors = [leaf_of(check, "w").relative_error for check in checks]
    assert errors[1] == errors[2]
    assert len(set(errors)) == 3


def test_evaluations_are_limited():
    plenty = check_gradient(layers_loss, PARAMS, X, Y)
    same = check_gradient(layers_loss, PARAMS, X, Y, max_evaluations=plenty.evaluations)
    assert plain(same) == plain(plenty)
    for limit in (0, 1, plenty.evaluations // 2, plenty.evaluations - 1):
        few = check_gradient(layers_loss, PARAMS, X, Y, max_evaluations=limit)
        assert not few.ok
        assert few.evaluations <= limit
        undecided = [x for x in few.leaves if x.verdict == "undecided"]
        assert undecided
        assert all("max_evaluations" in leaf.text for leaf in undecided)
        assert {leaf.verdict for leaf in few.leaves} <= {"right", "undecided"}


def test_too_few_evaluations_to_locate_an_error():
    values = one_off(jax.grad(steep)(MANY))
    whole = check_gradient(steep, MANY, gradient=values)
    for part in (4, 2, 1.2):
        limit = int(whole.evaluations / part)
        check = check_gradient(steep, MANY, gradient=values, max_evaluations=limit)
        assert not check.ok
        assert check.evaluations <= limit


# Params as people have them


def test_dtypes_side_by_side():
    dtypes = {"b": jnp.bfloat16, "h": jnp.float16, "s": jnp.float32, "d": jnp.float64}
    with jax.enable_x64(True):
        params = {name: draw(0, 4).astype(dtype) for name, dtype in dtypes.items()}

        def loss(p, rule):
            return sum(jnp.sum(rule(x).astype(jnp.float32)) for x in p.values())

        check = check_gradient(loss, params, square)
        assert check.ok
        assert {leaf.path: leaf.dtype for leaf in check.leaves} == {
            name: jnp.dtype(dtype).name for name, dtype in dtypes.items()
        }
        check = check_gradient(loss, params, wrong_square)
        assert verdicts(check) == dict.fromkeys(dtypes, "wrong")
        assert {leaf.cause.kind for leaf in check.leaves} == {"factor"}


def test_a_small_dtype_hides_no_error():
    """bfloat16 has less than three digits; the rule is judged in float64."""
    x = draw(0, 6).astype(jnp.bfloat16)
    rule = with_rule(square, lambda g: g * 1.001)
    wide = with_rule(lambda x: x.astype(jnp.float32) ** 2, lambda g: g)
    assert check_gradient(lambda p: jnp.sum(wide(p)), x).ok
    check = check_gradient(lambda p: jnp.sum(rule(p.astype(jnp.float32))), x)
    assert verdicts(check) == {"params": "wrong"}
    assert check.leaves[0].relative_error == pytest.approx(1e-3, rel=1e-3)


def test_a_whole_equinox_model():
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    check = check_gradient(loss, model, X[:, :3], Y[:, :2])
    names = [f"layers[{n}].{part}" for n in (0, 1) for part in ("weight", "bias")]
    assert verdicts(check) == dict.fromkeys(names, "right")
    broken = eqx.tree_at(lambda m: m.activation, model, with_rule(jnp.tanh, halved))
    check = check_gradient(loss, broken, X[:, :3], Y[:, :2])
    assert verdicts(check) == dict.fromkeys(names, "right") | dict.fromkeys(
        names[:2], "wrong"
    )


def test_a_flax_state_with_keys_and_dropout():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.first(x))))

    graph, state = nnx.split(Model(nnx.Rngs(0)))

    def loss(state, x, y):
        return jnp.mean((nnx.merge(graph, state)(x) - y) ** 2)

    check = check_gradient(loss, state, X, Y)
    assert check.ok, str(check)
    checked = {
        path.removesuffix(".value"): verdict
        for path, verdict in verdicts(check).items()
    }
    assert checked == {
        f"{layer}.{part}": "right"
        for layer in ("first", "last")
        for part in ("kernel", "bias")
    }


class Module(NamedTuple):
    weight: jax.Array
    name: str
    key: jax.Array
    off: None
    rate: float


def test_static_and_fixed_leaves_are_passed_over():
    params = Module(X[0], "layer", jax.random.key(0), None, 0.5)

    def loss(p, flag):
        noise = jax.random.bernoulli(p.key, p.rate, p.weight.shape)
        assert p.name == "layer"
        return jnp.sum((p.weight * noise) ** 2) if flag else 0.0

    check = check_gradient(loss, params, True)
    assert verdicts(check) == {"weight": "right"}


def test_numpy_leaves_and_a_number():
    assert verdicts(check_gradient(lambda p: p["x"] ** 2, {"x": np.float32(3)})) == {
        "x": "right"
    }
    check = check_gradient(lambda w: w**2, 3.0)
    assert (check.leaves[0].path, check.leaves[0].shape) == ("params", ())


# The same whatever surrounds it


class Compiled(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_loss_may_be_compiled(self):
        loss = self.variant(layers_loss)
        check = check_gradient(loss, PARAMS, X, Y)
        assert verdicts(check) == dict.fromkeys("bvw", "right")
        assert (
            check.evaluations == check_gradient(layers_loss, PARAMS, X, Y).evaluations
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_wrong_loss_may_be_compiled(self):
        def wrong(p):
            return jnp.sum(wrong_square(p["x"]) * p["y"])

        params = {"x": X[0], "y": Y[0]}
        check = check_gradient(self.variant(wrong), params)
        assert verdicts(check) == {"x": "wrong", "y": "right"}
        assert leaf_of(check, "x").cause.kind == "factor"
        assert wrong_rules(check) == [place_of(square)]


def test_without_jit():
    with jax.disable_jit():
        check = check_gradient(lambda p: jnp.sum(wrong_square(p)), X[0])
    assert verdicts(check) == {"params": "wrong"}


def test_the_same_verdicts_under_x64():
    def wrong(p, x, y):
        return layers_loss(p | {"w": wrong_square(p["w"])}, x, y)

    for loss in (layers_loss, wrong):
        plain_check = check_gradient(loss, PARAMS, X, Y)
        with jax.enable_x64(True):
            wide = check_gradient(loss, PARAMS, X, Y)
        assert verdicts(wide) == verdicts(plain_check)
        assert wrong_rules(wide) == wrong_rules(plain_check)


def test_two_calls_give_the_same():
    def wrong(p, x, y):
        return layers_loss(p | {"w": wrong_square(p["w"])}, x, y)

    for loss in (layers_loss, wrong):
        first, second = (plain(check_gradient(loss, PARAMS, X, Y)) for _ in range(2))
        assert first == second


def settings_now():
    return dict(jax.config.values), jax.config.jax_enable_x64, jnp.ones(()).dtype


def test_jax_is_left_as_it_was():
    before = settings_now()
    check_gradient(layers_loss, PARAMS, X, Y, order=2)
    assert settings_now() == before

    def fails_in_float64(p):
        if p.dtype == jnp.float64 or jax.config.jax_enable_x64:
            raise RuntimeError("not in float64")
        return jnp.sum(p**2)

    assert check_gradient(fails_in_float64, X[0]).ok
    with pytest.raises(ZeroDivisionError):
        check_gradient(lambda p: jnp.sum(p) / 0 + 1 // 0, X[0])
    with pytest.raises(ValueError, match="callback"):
        check_gradient(calls_the_host, X[0])
    assert settings_now() == before


def test_debug_prints_are_no_obstacle(capsys):
    def loss(p):
        jax.debug.print("norm {}", jnp.sum(p))
        return jnp.sum(wrong_square(p))

    check = check_gradient(loss, X[0])
    assert verdicts(check) == {"params": "wrong"}
    assert capsys.readouterr().out.count("norm") <= 2  # not once per evaluation


def test_what_cannot_be_widened_is_named():
    def loss(p):
        bits = jax.lax.bitcast_convert_type(p, jnp.int32)
        sign = jnp.where(bits < 0, -1.0, 1.0)
        return jnp.sum(sign * p**3)

    check = check_gradient(loss, X[0])
    assert check.ok, str(check)
    (finding,) = check.findings
    assert finding.kind == "native"
    assert "bitcast_convert_type" in finding.text
    assert not check_gradient(lambda p: loss(wrong_square(p)), X[0]).ok


# The report


def wrong_report():
    params = {f"leaf{n:02}": draw(n, 3, 2) for n in range(30)}

    def loss(p):
        good = sum(jnp.sum(jnp.sin(x)) for x in p.values())
        return good + jnp.sum(wrong_square(p["leaf17"]))

    return check_gradient(loss, params)


REPORTS = {
    "right": lambda: check_gradient(layers_loss, PARAMS, X, Y),
    "wrong": wrong_report,
    "not finite": lambda: check_gradient(lambda p: jnp.sum(jnp.sqrt(p)), jnp.zeros(3)),
    "nan": lambda: check_gradient(lambda p: jnp.sum(jnp.log(p)), -jnp.ones(3)),
    "kink": lambda: check_gradient(lambda p: jnp.sum(jnp.abs(p)), jnp.zeros(3)),
    "second order": lambda: check_gradient(jnp.sin, 1.0, order=2),
    "a long path": lambda: check_gradient(
        lambda p: jnp.sum(p["a" * 100]["b" * 50]), {"a" * 100: {"b" * 50: X[0]}}
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_habits(name):
    report = REPORTS[name]()
    assert bool(report) == report.ok
    assert report.ok == (name not in ("wrong", "not finite", "nan"))
    json.dumps(report.to_dict(), allow_nan=False)
    data = report.to_dict()
    assert data["ok"] == report.ok
    assert [x["verdict"] for x in data["leaves"]] == [x.verdict for x in report.leaves]
    text = str(report)
    assert repr(report) == text
    assert max(map(len, text.splitlines())) <= 80
    assert f"{report.evaluations} evaluations" in " ".join(text.split())
    assert f"{report.seconds:.2f} s" in " ".join(text.split())
    html = report._repr_html_()
    assert html.startswith("<table>")
    assert all(leaf.verdict in html for leaf in report.leaves)
    assert report.evaluations > 0
    assert 0 < report.seconds < 60
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.ok = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.leaves[0].verdict = "right"
    assert report == report
    assert report != dataclasses.replace(report)


def test_print_of_a_wrong_gradient():
    text = str(wrong_report())
    lines = text.splitlines()
    assert "leaf17" in lines[0]  # the title names it,
    rows = [line.split() for line in lines if line.startswith(" leaf")]
    assert (rows[1][0], rows[1][4]) == ("leaf17", "wrong")  # first under its heading
    assert len(rows) < 25  # the long tree is folded
    (more,) = [line for line in lines if line.startswith(" and ")]
    assert "10 right" in more
    for said in ("claimed by the", "loss's values", "give or take", "6 of 6 entries"):
        assert said in text
    assert "`square` (test_checking.py, line" in text


def test_infinite_numbers_are_texts_in_plain_data():
    data = REPORTS["not finite"]().to_dict()
    assert data["leaves"][0]["entries"][0]["claimed"] == "inf"


def test_assert_gradient():
    assert assert_gradient(layers_loss, PARAMS, X, Y) is None
    with pytest.raises(AssertionError) as caught:
        assert_gradient(lambda p: jnp.sum(wrong_square(p["x"])), {"x": X[0]})
    for said in ("wrong in `x`", "`square` (test_checking.py", "2 times too small"):
        assert said in " ".join(str(caught.value).split())
    with pytest.raises(AssertionError, match="not finite"):
        assert_gradient(lambda p: jnp.sum(jnp.sqrt(p)), jnp.zeros(3))
    wrong = MISTAKES["half a percent"][0]
    with pytest.raises(AssertionError):
        assert_gradient(layers_loss, PARAMS, X, Y, gradient=wrong)
    assert_gradient(layers_loss, PARAMS, X, Y, gradient=wrong, rtol=1e-2)


def test_assert_gradient_of_undecided():
    with pytest.raises(AssertionError, match="undecided"):
        assert_gradient(coarse, POINT)
    assert_gradient(coarse, POINT, undecided="pass")

    def wrong_too(p):
        return coarse(p) + wrong_square(p["x"])[0]

    with pytest.raises(AssertionError, match="wrong in `x`"):
        assert_gradient(wrong_too, POINT, undecided="pass")


# Bad input


def calls_the_host(p):
    shape = jax.ShapeDtypeStruct(p.shape, p.dtype)
    rule = jax.custom_vjp(lambda x: jax.pure_callback(np.sin, shape, x))
    rule.defvjp(lambda x: (rule.fun(x), x), lambda x, ct: (ct * jnp.cos(x),))
    return jnp.sum(rule(p))


def raises(p, *_):
    raise KeyError("no such layer")


def loss_of_a(p):
    return jnp.sum(p["a"] ** 2)


A = {"a": jnp.ones(3), "n": jnp.arange(3)}
# What is called, the error, and what its message says.
REFUSED = {
    "no floats": (
        lambda: check_gradient(loss_of_a, {"n": A["n"]}),
        (TypeError, r"no array of floats.*`n` is integer"),
    ),
    "no leaves": (lambda: check_gradient(loss_of_a, {}), (TypeError, "has no leaves")),
    "complex": (
        lambda: check_gradient(loss_of_a, {"a": jnp.ones(3, jnp.complex64)}),
        (TypeError, "`a` has dtype complex64"),
    ),
    "foreign": (
        lambda: check_gradient(loss_of_a, {"a": torch.ones(3)}),
        (TypeError, "(?s)`a`.*torch"),
    ),
    "integers returned": (
        lambda: check_gradient(lambda p: jnp.arange(3), A),
        (TypeError, "no floating array"),
    ),
    "text returned": (
        lambda: check_gradient(lambda p: "done", A),
        (TypeError, "(?s)test_checking.*str"),
    ),
    "no aux": (
        lambda: check_gradient(loss_of_a, A, has_aux=True),
        (TypeError, "`loss_of_a` .*aux"),
    ),
    "another structure": (
        lambda: check_gradient(loss_of_a, A, gradient={"b": A["a"]}),
        (ValueError, "gradient= has no leaf `a`.*`b`"),
    ),
    "another structure from a function": (
        lambda: check_gradient(loss_of_a, A, gradient=lambda p: (2 * p["a"],)),
        (ValueError, r"gradient= has no leaf `a`.*`\[0\]`"),
    ),
    "a leaf too many": (
        lambda: check_gradient(
            loss_of_a, A, gradient={"a": 2 * A["a"], "n": None, "extra": A["a"]}
        ),
        (ValueError, "gradient= .*`extra`"),
    ),
    "another shape": (
        lambda: check_gradient(loss_of_a, A, gradient={"a": jnp.ones((3, 1))}),
        (ValueError, r"\(3, 1\) in leaf `a`, where params has \(3,\)"),
    ),
    "another shape from a function": (
        lambda: check_gradient(loss_of_a, A, gradient=lambda p: {"a": p["a"][:2]}),
        (ValueError, r"\(2,\) in leaf `a`, where params has \(3,\)"),
    ),
    "no such leaf": (
        lambda: check_gradient(loss_of_a, A, leaves=["a", "b*"]),
        (ValueError, r"leaves='b\*' fits no leaf. The leaves are a;"),
    ),
    "nothing to trust": (
        lambda: check_gradient(loss_of_a, A, trust=(rounded,)),
        (ValueError, r"`?rounded`? .*no custom rule of it.*rules: none"),
    ),
    "a function without a rule": (
        lambda: check_gradient(
            lambda p: jnp.sum(wrong_square(p["a"])), A, trust=(by_hand,)
        ),
        (ValueError, r"(?s)by_hand.*square"),
    ),
    "a callback": (
        lambda: check_gradient(calls_the_host, A["a"]),
        (ValueError, "(?s)pure_callback.*reference="),
    ),
    "a kernel": (
        lambda: check_gradient(
            lambda p: jnp.sum(kernel(lambda g: g)(p["x"])), {"x": X[0]}
        ),
        (ValueError, "(?s)pallas_call.*reference="),
    ),
    "third order": (
        lambda: check_gradient(loss_of_a, A, order=3),
        ((ValueError, TypeError), "(?s)order.*3"),
    ),
    "undecided": (
        lambda: assert_gradient(loss_of_a, A, undecided="maybe"),
        ((ValueError, TypeError), "(?s)undecided.*maybe"),
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, (error, says) = REFUSED[name]
    with pytest.raises(error, match=says):
        call()


@pytest.mark.bad_input
def test_a_loss_that_raises():
    with pytest.raises(KeyError, match="no such layer") as caught:
        check_gradient(raises, A)
    assert "`raises` (test_checking.py, line" in caught.value.__notes__[-1]


@pytest.mark.bad_input
def test_a_gradient_that_raises():
    with pytest.raises(KeyError, match="no such layer"):
        check_gradient(loss_of_a, A, gradient=raises)


@pytest.mark.bad_input
@pytest.mark.parametrize("given", [None, jnp.ones(3)])
def test_nan_at_the_point_is_no_pass(given):
    check = check_gradient(lambda p: jnp.sum(jnp.log(p)), -jnp.ones(3), gradient=given)
    assert not check.ok
    (leaf,) = check.leaves
    assert leaf.verdict in ("undecided", "nonfinite")
    assert "nan" in leaf.text


@pytest.mark.bad_input
def test_a_given_gradient_that_is_not_finite():
    check = check_gradient(
        loss_of_a, A, gradient={"a": np.array([2.0, np.nan, 2.0]), "n": None}
    )
    leaf = leaf_of(check, "a")
    assert (leaf.verdict, leaf.entries[0].index) == ("nonfinite", (1,))
    assert leaf.entries[0].reference == pytest.approx(2.0)


@pytest.mark.bad_input
def test_a_loss_that_is_not_deterministic():
    count = iter(range(100))

    def loss(p):
        return jnp.sum(p**2) + next(count)

    check = check_gradient(loss, X[0])
    assert verdicts(check) == {"params": "undecided"}
    assert "deterministic" in check.leaves[0].text
    assert [f.kind for f in check.findings] == ["nondeterministic"]
    assert not check.ok


@pytest.mark.bad_input
def test_warnings_of_the_loss_reach_the_caller():
    def loss(p):
        warnings.warn("old", DeprecationWarning, stacklevel=2)
        return jnp.sum(p**2)

    with pytest.warns(DeprecationWarning, match="old"):
        assert check_gradient(loss, X[0]).ok


def test_a_report_is_made_of_the_public_pieces():
    check = check_gradient(lambda p: jnp.sum(wrong_square(p)), X[0])
    assert isinstance(check, jaxgrad.GradientCheck)
    (leaf,), (rule,) = check.leaves, check.rules
    assert isinstance(leaf, jaxgrad.LeafCheck)
    assert isinstance(leaf.entries[0], jaxgrad.EntryCheck)
    assert isinstance(rule, jaxgrad.RuleCheck)
    noisy = check_gradient(
        lambda p: jnp.sum(jax.random.gamma(jax.random.key(0), p)), X[0] ** 2
    )
    assert noisy
    assert isinstance(noisy.findings[0], jaxgrad.Finding)
    assert noisy.findings[0].kind == "implicit"
