"""Tests the linear layer: its values, its shapes, and the draw of its parameters."""

import math

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad

SIDES = st.integers(1, 4)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@settings(deadline=None, max_examples=15)
@given(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), SIDES, SIDES)
def test_any_batch_shape_gives_torchs_values(batch, features, out):
    weight, bias, x = draw(0, out, features), draw(1, out), draw(2, *batch, features)
    with jax.enable_x64(True):
        ours = jaxgrad.linear(jaxgrad.LinearParams(weight, bias), x)
    theirs = torch.nn.functional.linear(*map(torch.tensor, (x, weight, bias)))
    assert ours.shape == (*batch, out)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


class Compiled(chex.TestCase):
    """The same function compiled and not."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_linear(self):
        params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
        prediction = self.variant(jaxgrad.linear)(params, jnp.array([[1.0, 2.0, 3.0]]))
        np.testing.assert_array_equal(prediction, [[2.5]])

    @chex.variants(with_jit=True, without_jit=True)
    def test_init_linear(self):
        draw = self.variant(jaxgrad.init_linear, static_argnums=(1, 2))
        params = draw(jax.random.key(0), 3, 2)
        chex.assert_shape(params, [(2, 3), (2,)])


def test_numpy_and_jax_arrays_give_the_same():
    arrays = [draw(seed, *shape) for seed, shape in enumerate([(2, 3), (2,), (5, 3)])]
    arrays = [array.astype(np.float32) for array in arrays]
    weight, bias, x = map(jnp.asarray, arrays)
    chex.assert_trees_all_equal(
        jaxgrad.linear(jaxgrad.LinearParams(*arrays[:2]), arrays[2]),
        jaxgrad.linear(jaxgrad.LinearParams(weight, bias), x),
        strict=True,
    )


def uniform_on(bound, numbers):
    """How likely numbers at least this far from U(-bound, bound) would be."""
    assert np.all(np.abs(numbers) <= bound)
    return scipy.stats.kstest(numbers, "uniform", (-bound, 2 * bound)).pvalue


@pytest.mark.parametrize("features", [1, 3, 50])
def test_init_draws_from_the_distribution_of_torchs_default(features):
    bound, out = 1 / math.sqrt(features), 20_000
    ours = jaxgrad.init_linear(jax.random.key(0), features, out)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = torch.nn.Linear(features, out)
    theirs = jaxgrad.LinearParams(*(p.detach().numpy() for p in layer.parameters()))
    for params in ours, theirs:
        assert params.weight.shape == (out, features)
        assert params.bias.shape == (out,)
        for leaf in params:
            assert uniform_on(bound, np.ravel(leaf)) > 0.001


def test_the_draws_differ_between_weight_bias_and_keys():
    one, two = (jaxgrad.init_linear(jax.random.key(k), 1, 1000) for k in (0, 1))
    assert (
        abs(np.corrcoef([one.weight[:, 0], one.bias, two.weight[:, 0]])[0, 1:]).max()
        < 0.1
    )


def test_init_takes_old_and_new_keys_alike():
    chex.assert_trees_all_equal(
        jaxgrad.init_linear(jax.random.key(3), 4, 2),
        jaxgrad.init_linear(jax.random.PRNGKey(3), 4, 2),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params = jaxgrad.init_linear(jax.random.key(0), 3, 2, dtype)
    chex.assert_type(params, dtype)
    assert jaxgrad.linear(params, jnp.ones((5, 3), dtype)).dtype == dtype


def test_float64_is_drawn_in_full():
    with jax.enable_x64(True):
        params = jaxgrad.init_linear(jax.random.key(0), 3, 2, jnp.float64)
    chex.assert_type(params, jnp.float64)
    weight = np.asarray(params.weight)
    assert np.any(weight != weight.astype(np.float32))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weight", "bias", "x", "words"),
    [
        ((3,), (1,), (5, 3), [r"weight has shape \(3,\)", r"\(out_features, in_"]),
        ((2, 3), (3,), (5, 3), [r"bias has shape \(3,\)", r"\(2, 3\)", r"\(2,\)"]),
        ((1, 3), (1, 1), (5, 3), [r"bias has shape \(1, 1\)", r"\(1,\) was expected"]),
        (
            (2, 3),
            (2,),
            (5, 4),
            [r"x has shape \(5, 4\)", r"\(2, 3\)", "in_features, 3"],
        ),
        ((3, 2), (3,), (5, 3), [r"x has shape \(5, 3\)", r"transposed.*\(out, in\)"]),
    ],
)
def test_shapes_that_do_not_fit(weight, bias, x, words):
    params = jaxgrad.LinearParams(np.ones(weight), np.ones(bias))
    with pytest.raises(ValueError, match=".*".join(words)):
        jaxgrad.linear(params, np.ones(x))


@pytest.mark.bad_input
@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-2, 1)])
def test_a_layer_needs_features(sizes):
    with pytest.raises(ValueError, match=f"features must be at least 1.*{min(sizes)}"):
        jaxgrad.init_linear(jax.random.key(0), *sizes)


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_parameters_must_be_floating(dtype):
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"dtype must be floating, and is {name}"):
        jaxgrad.init_linear(jax.random.key(0), 3, 1, dtype)


@pytest.mark.bad_input
def test_an_input_without_features_is_refused():
    params = jaxgrad.LinearParams(np.ones((2, 3), np.float32), np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"x has shape \(\), and weight \(2, 3\)"):
        jaxgrad.linear(params, np.float32(1))
