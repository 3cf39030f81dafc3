"""An Equinox MLP, trained as it is: its callables and numbers stay what they are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad

key = jax.random.key(0)
model = eqx.nn.MLP(1, 1, width_size=32, depth=2, activation=jnp.tanh, key=key)
x = jnp.linspace(-3, 3, 64)[:, None]
y = jnp.sin(2 * x)


def loss(model, x, y):
    return jaxgrad.mean_squared_error(jax.vmap(model)(x), y)


# The gradient is Equinox's own: the model's structure, None where there is no array.
value, gradient = jaxgrad.value_and_grad(loss)(model, x, y)
value_there, there = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, x, y)
assert gradient.activation is None
assert jax.tree.structure(gradient) == jax.tree.structure(there)
largest = max(
    float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(there), strict=True)
)
print(f"loss before        {value:.6f}, by Equinox {value_there:.6f}")
print(f"gradients differ   by {largest:.1e} of a leaf's largest entry")
assert largest < 1e-5

result = jaxgrad.train(loss, model, x, y, steps=2000, optimizer=optax.adam(3e-3))
trained = result.params
print(f"loss after         {loss(trained, x, y):.6f}, {result.steps} steps of Adam")
print(f"still a            {type(trained).__name__} with {trained.activation.__name__}")
assert loss(trained, x, y) < 1e-3
assert trained.activation is model.activation

middle = float(trained(jnp.array([0.5]))[0])
print(f"at x = 0.5         {middle:.4f}, and sin(2x) is {np.sin(1.0):.4f}")
np.testing.assert_allclose(middle, np.sin(1.0), atol=0.01)
