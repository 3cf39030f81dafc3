"""Tests the losses: their values, their gradients, and their strict shape rule."""

import re

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxgrad

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4)


def draw(seed, *shape):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


@settings(deadline=None, max_examples=12)
@given(SHAPES)
def test_equal_shapes_give_torchs_values_and_gradients(shape):
    prediction, target = draw(0, *shape), draw(1, *shape)
    theirs = torch.tensor(prediction, requires_grad=True)
    loss = torch.nn.functional.mse_loss(theirs, torch.tensor(target))
    loss.backward()
    with jax.enable_x64(True):
        assert jaxgrad.squared_error(prediction, target).shape == shape
        value, gradient = jaxgrad.value_and_grad(jaxgrad.mean_squared_error)(
            prediction, target
        )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-12)


@settings(deadline=None, max_examples=12)
@given(
    batch=hnp.array_shapes(min_dims=0, max_dims=2, min_side=1, max_side=5),
    features=st.integers(1, 4),
    out=st.integers(1, 4),
)
def test_linear_loss_gives_torchs_gradients(batch, features, out):
    weight, bias = draw(0, out, features), draw(1, out)
    x, y = draw(2, *batch, features), draw(3, *batch, out)
    theirs = [torch.tensor(leaf, requires_grad=True) for leaf in (weight, bias)]
    prediction = torch.nn.functional.linear(torch.tensor(x), *theirs)
    torch.nn.functional.mse_loss(prediction, torch.tensor(y)).backward()
    with jax.enable_x64(True):
        ours = jaxgrad.grad(jaxgrad.linear_loss)(
            jaxgrad.LinearParams(weight, bias), x, y
        )
    for mine, leaf in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, leaf.grad, rtol=1e-12, atol=1e-12)


class Compiled(chex.TestCase):
    """The same function compiled and not."""

    def setUp(self):
        super().setUp()
        self.params = jaxgrad.LinearParams(
            jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3])
        )
        self.x, self.y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_lessons_errors(self):
        errors = self.variant(jaxgrad.squared_error)(jnp.array([[2.5]]), self.y)
        np.testing.assert_array_equal(errors, [[6.25]])

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_lessons_mean(self):
        loss = self.variant(jaxgrad.mean_squared_error)(jnp.array([[2.5]]), self.y)
        np.testing.assert_array_equal(loss, 6.25)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_lessons_loss(self):
        loss = self.variant(jaxgrad.linear_loss)(self.params, self.x, self.y)
        np.testing.assert_array_equal(loss, 6.25)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_lessons_gradient(self):
        gradient = self.variant(jaxgrad.grad(jaxgrad.linear_loss))(
            self.params, self.x, self.y
        )
        np.testing.assert_array_equal(gradient.weight, [[-5.0, -10.0, -15.0]])
        np.testing.assert_array_equal(gradient.bias, [-5.0])


def test_numpy_and_jax_arrays_give_the_same(neuron):
    for loss, operands in (
        (jaxgrad.squared_error, neuron[1:2] * 2),
        (jaxgrad.mean_squared_error, neuron[1:2] * 2),
        (jaxgrad.linear_loss, neuron),
    ):
        in_numpy = jax.tree.map(np.asarray, operands)
        chex.assert_trees_all_equal(loss(*in_numpy), loss(*operands), strict=True)


def test_whole_numbers_are_not_wrapped():
    dark, light = np.array([0], np.uint8), np.array([200], np.uint8)
    assert jaxgrad.mean_squared_error(light, dark) == 200**2
    assert jaxgrad.mean_squared_error(dark, light) == 200**2


@pytest.mark.bad_input
@settings(deadline=None, max_examples=60)
@given(SHAPES, SHAPES)
def test_different_shapes_are_refused_and_named(prediction, target):
    assume(prediction != target)
    words = re.escape(
        f"prediction has shape {prediction} and target has shape {target}"
    )
    for loss in jaxgrad.squared_error, jaxgrad.mean_squared_error:
        with pytest.raises(ValueError, match=words):
            loss(np.ones(prediction), np.ones(target))


@pytest.mark.bad_input
@settings(deadline=None, max_examples=5)
@given(hnp.array_shapes(min_dims=0, max_dims=2, max_side=4))
def test_a_missing_last_dimension_names_a_fix_that_works(shape):
    column, row = np.ones((*shape, 1)), np.ones(shape)
    for loss in jaxgrad.squared_error, jaxgrad.mean_squared_error:
        for prediction, target in (column, row), (row, column):
            with pytest.raises(ValueError, match="nothing is broadcast") as caught:
                loss(prediction, target)
            fix = re.search("`(.*)`", str(caught.value))[1]
            assert np.all(loss(prediction, eval(fix, {"target": target})) == 0)


@pytest.mark.bad_input
def test_linear_loss_keeps_the_rule():
    params = jaxgrad.LinearParams(np.ones((1, 3)), np.ones(1))
    words = r"\(8, 1\) and target has shape \(8,\).*`target\[..., None\]`"
    with pytest.raises(ValueError, match=words):
        jaxgrad.linear_loss(params, np.ones((8, 3)), np.ones(8))
    with pytest.raises(ValueError, match=r"x has shape \(8, 2\)"):
        jaxgrad.linear_loss(params, np.ones((8, 2)), np.ones((8, 1)))


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(0,), (0, 1), (3, 0)])
def test_an_empty_batch_is_refused(shape):
    words = re.escape(f"empty, of shape {shape}") + ".*Leave empty batches out"
    with pytest.raises(ValueError, match=words):
        jaxgrad.mean_squared_error(np.ones(shape), np.ones(shape))


@pytest.mark.bad_input
def test_linear_loss_refuses_an_empty_batch():
    params = jaxgrad.LinearParams(np.ones((1, 3)), np.ones(1))
    with pytest.raises(ValueError, match=r"empty, of shape \(0, 1\)"):
        jaxgrad.linear_loss(params, np.ones((0, 3)), np.ones((0, 1)))
