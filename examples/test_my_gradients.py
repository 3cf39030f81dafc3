"""Tests of gradients, as they'd stand in a project of yours: `pytest` runs them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxgrad

model = eqx.nn.MLP(3, 1, width_size=8, depth=2, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (16, 3))
y = jnp.sin(x.sum(axis=1, keepdims=True))


def loss(model, x, y):
    return jaxgrad.mean_squared_error(jax.vmap(model)(x), y)


# An assertion prints the whole report when it fails. One test for each layer:
@pytest.mark.parametrize("layer", range(len(model.layers)))
def test_a_layer_of_the_model(layer):
    jaxgrad.assert_gradient(loss, model, x, y, leaves=f"layers[{layer}].*")


# The check itself is true or false, and has the facts.
def test_a_loss_of_ones_own():
    def huber(residual):
        size = jnp.abs(residual)
        return jnp.mean(jnp.where(size < 1, residual**2 / 2, size - 0.5))

    check = jaxgrad.check_gradient(huber, jnp.linspace(-3, 3, 8), order=2)
    assert check
    assert check.second_order.ok
    assert check.leaves[0].digits > 5


@jax.custom_vjp
def quantize(weight):
    """Rounds. Its gradient passes straight through, as if it didn't."""
    return jnp.round(4 * weight) / 4


quantize.defvjp(lambda weight: (quantize(weight), None), lambda _, ct: (ct,))


def quantized_loss(weight, x, y):
    return jaxgrad.mean_squared_error(jnp.tanh(x @ quantize(weight)), y)


# A rule that isn't meant to be the derivative is trusted. The rest is still checked.
def test_straight_through():
    weight = jnp.array([[0.3], [-0.6], [0.9]])
    assert not jaxgrad.check_gradient(quantized_loss, weight, x, y)
    jaxgrad.assert_gradient(quantized_loss, weight, x, y, trust=[quantize])


@jax.custom_vjp
def softplus(x):
    """log(1 + exp(x)), with a mistake in its rule."""
    return jnp.logaddexp(x, 0)


softplus.defvjp(
    lambda x: (softplus(x), x),
    lambda x, ct: (ct * jax.nn.sigmoid(-x),),  # should be sigmoid(x)
)


# A wrong rule makes the assertion fail. The message names the leaf and the rule.
def test_a_wrong_rule_is_found():
    with pytest.raises(AssertionError, match=r"wrong in `bias`(?s:.*)`softplus`"):
        jaxgrad.assert_gradient(
            lambda p, x: jnp.mean(softplus(x @ p["weight"] + p["bias"])),
            {"weight": jnp.array([0.3, -0.6, 0.9]), "bias": jnp.array(0.1)},
            x,
        )
