"""Tests the table of differences against the theory of their errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad

DTYPES = ["bfloat16", "float16", "float32", "float64"]


def test_the_lessons_limit():
    table = jaxgrad.difference_table(lambda w: w**2, 3.0, dtype="float64")
    assert isinstance(table, jaxgrad.DifferenceTable)
    assert table.exact == 6.0
    for row in table.rows[:6]:
        # (3 + h)**2 - 3**2 is 6h + h**2: off by h, and by nothing in the middle.
        np.testing.assert_allclose(row.forward_error, row.h, rtol=1e-4)
        assert row.central_error < 1e-9


def test_error_falls_as_theory_says_then_rises():
    table = jaxgrad.difference_table(jnp.exp, 1.0, dtype="float64")
    by_h = {row.h: row for row in table.rows}
    for power in range(1, 6):
        ratio = by_h[10**-power].forward_error / by_h[10 ** -(power + 1)].forward_error
        assert 9.9 < ratio < 10.5  # O(h)
    for power in range(1, 4):
        ratio = by_h[10**-power].central_error / by_h[10 ** -(power + 1)].central_error
        assert 99 < ratio < 101  # O(h^2)
    assert table.best_central.central_error < table.best_forward.forward_error / 10
    for row in table.rows[-3:]:
        assert row.forward_error > 1000 * table.best_forward.forward_error
        assert row.central_error > 1000 * table.best_central.central_error


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_error_is_within_its_bound(dtype):
    table = jaxgrad.difference_table(jnp.exp, 1.0, dtype=dtype)
    eps = float(jnp.finfo(dtype).eps)
    assert table.dtype == dtype
    np.testing.assert_allclose(table.exact, math.e, rtol=1e-15)
    assert table.rows[0].h == 1.0
    assert table.rows[-1].h < eps <= 10 * table.rows[-1].h
    for row in table.rows:
        largest = math.exp(1 + row.h)  # of the loss and all its derivatives
        # Two values, each off by 2 eps, and by half an eps of w + h before.
        rounding = 5 * eps * largest / row.h
        assert row.forward_error <= row.h / 2 * largest + rounding
        assert row.central_error <= row.h**2 / 6 * largest + rounding
        assert row.forward_error == abs(row.forward - table.exact)
        assert row.central_error == abs(row.central - table.exact)
    assert table.best_forward.forward_error == min(r.forward_error for r in table.rows)
    assert table.best_central.central_error == min(r.central_error for r in table.rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_best_steps_are_near_their_theory(dtype):
    # For exp truncation and rounding balance at 1.4 sqrt(eps) and 1.1 cbrt(eps). The
    # nearest power of ten is at most half a decade off. One table may be lucky in its
    # rounding at another step; the median of many isn't, by more than half a decade.
    eps = float(jnp.finfo(dtype).eps)
    tables = [
        jaxgrad.difference_table(jnp.exp, w, dtype=dtype)
        for w in np.linspace(0.5, 1.5, 31)
    ]
    forward = np.median([np.log10(table.best_forward.h) for table in tables])
    central = np.median([np.log10(table.best_central.h) for table in tables])
    assert abs(forward - np.log10(eps) / 2) <= 1
    assert abs(central - np.log10(eps) / 3) <= 1


def layer_loss(layer, x, y):
    return jnp.mean((jnp.tanh(x @ layer.weight.T + layer.bias) - y) ** 2)


RNG = np.random.default_rng(0)
LAYER, DIRECTION = (
    jaxgrad.LinearParams(RNG.normal(size=(2, 3)), RNG.normal(size=2)) for _ in range(2)
)
DATA = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))


def test_a_tree_along_a_direction():
    table = jaxgrad.difference_table(
        layer_loss, LAYER, *DATA, direction=DIRECTION, dtype="float64"
    )
    with jax.enable_x64(True):
        expected = jax.jvp(lambda p: layer_loss(p, *DATA), (LAYER,), (DIRECTION,))[1]
        np.testing.assert_allclose(table.exact, expected, rtol=1e-14)
    assert table.best_forward.forward_error < 1e-6
    assert table.best_central.central_error < 1e-9


def test_the_usual_direction_is_1_everywhere():
    table = jaxgrad.difference_table(layer_loss, LAYER, *DATA, dtype="float64")
    ones = jax.tree.map(np.ones_like, LAYER)
    given = jaxgrad.difference_table(
        layer_loss, LAYER, *DATA, dtype="float64", direction=ones
    )
    assert (table.exact, table.rows) == (given.exact, given.rows)


def test_other_leaves_and_arguments_stay():
    def loss(params, index, key, flag):
        assert flag is True
        noise = jax.random.normal(key, (3,), params["w"].dtype)
        loss = params["w"][index] ** params["power"] * (1 + 0 * noise[0])
        return loss, noise

    params = {"w": jnp.array([1.0, 2.0, 3.0]), "power": 3, "name": "cubic"}
    table = jaxgrad.difference_table(
        loss, params, jnp.array(1), jax.random.key(0), True, has_aux=True
    )
    assert table.dtype == "float32"
    assert table.exact == 12.0
    along_first = {"w": np.array([1.0, 0.0, 0.0]), "power": None, "name": None}
    table = jaxgrad.difference_table(
        loss,
        params,
        jnp.array(1),
        jax.random.key(0),
        True,
        has_aux=True,
        direction=along_first,
    )
    assert table.exact == 0.0


@pytest.mark.parametrize("direction", [np.array([1.0, 0.0]), np.array([1, 0])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_is_computed_in_the_dtype(dtype, direction):
    seen = set()

    def loss(w, x):
        seen.add((w.dtype.name, x.dtype.name))
        return jnp.sum(w * x)

    ones = jnp.ones(2)
    jaxgrad.difference_table(loss, ones, ones, dtype=dtype, direction=direction)
    assert seen == {(dtype, dtype), ("float64", "float64")}


@pytest.mark.parametrize("wide", [False, True])
def test_x64_is_left_as_found(wide):
    with jax.enable_x64(wide):
        table = jaxgrad.difference_table(lambda w: w**2, jnp.asarray(3.0))
        assert jax.config.jax_enable_x64 is wide
        assert table.dtype == ("float64" if wide else "float32")
        with pytest.raises(ZeroDivisionError):
            jaxgrad.difference_table(lambda w: 1 // 0, 3.0)
        assert jax.config.jax_enable_x64 is wide


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "direction",
    [
        LAYER.weight,
        jaxgrad.LinearParams(LAYER.weight, LAYER.weight),
        {"weight": LAYER.weight, "bias": LAYER.bias},
        tuple(LAYER),
    ],
    ids=["leaf", "shape", "dict", "tuple"],
)
def test_a_direction_of_another_shape(direction):
    with pytest.raises(ValueError, match=r"direction must have .*\(2, 3\).*\(2,\)"):
        jaxgrad.difference_table(layer_loss, LAYER, *DATA, direction=direction)


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_a_dtype_must_be_floating(dtype):
    with pytest.raises(TypeError, match=f"dtype must be floating, and is {dtype}"):
        jaxgrad.difference_table(lambda w: w**2, 3.0, dtype=dtype)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("loss", "params", "error", "words"),
    [
        (jnp.sum, {"w": np.arange(3)}, TypeError, "`w` .*int.*split it off"),
        (jnp.square, 3, TypeError, r"Python number 3.*jnp.asarray\(3.0\)"),
        (jnp.square, jnp.ones(1), ValueError, r"`loss.squeeze\(\)`"),
        (3, 3.0, TypeError, "loss must be a function|parameter 'loss'"),
    ],
    ids=["int", "number", "size 1", "no loss"],
)
def test_losses_and_parameters_as_value_and_grad_refuses_them(
    loss, params, error, words
):
    with pytest.raises(error, match=words):
        jaxgrad.difference_table(loss, params)
