"""Linear regression on real data: trained until it agrees with the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_diabetes

import jaxgrad


def standardise(columns):
    return (columns - columns.mean(axis=0)) / columns.std(axis=0)


data = load_diabetes()
x, y = standardise(data.data), standardise(data.target[:, None])
patients, features = x.shape

# The closed form: least squares in float64, with a column of ones for the bias.
exact, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(patients)]), y)

# The loss is quadratic, so that its curvature is the same everywhere. Along the most
# curved direction a learning rate of 1 / curvature lands in one step, and one above
# 2 / curvature diverges. The least curved direction is the slow one: it needs some
# multiple of largest / smallest steps.
x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
start = jaxgrad.LinearParams(weight=jnp.zeros((1, features)), bias=jnp.zeros(1))
flat, unflatten = ravel_pytree(start)
hessian = jax.hessian(lambda p: jaxgrad.linear_loss(unflatten(p), x, y))(flat)
smallest, *_, largest = map(float, jnp.linalg.eigvalsh(hessian))
condition = largest / smallest
print(f"{patients} patients, {features} features, standardised")
print(f"curvature      {smallest:.4g} to {largest:.4g}, condition {condition:.0f}")
print(f"learning rate  1 / {largest:.4g} = {1 / largest:.4g}")


def train(learning_rate, steps):
    return jaxgrad.train(
        jaxgrad.linear_loss, start, x, y, steps=steps, learning_rate=learning_rate
    )


too_far = train(2.1 / largest, steps=200)
print(f"at 2.1 times   loss {too_far.losses[0]:.4f} to {too_far.losses[-1]:.4g}")
assert too_far.losses[-1] > too_far.losses[0]

# Each step leaves 1 - 1 / condition of the slowest error, and e⁻²⁰ is under rounding.
result = train(1 / largest, steps=int(20 * condition))
print(f"trained        {result.steps} steps, loss {result.losses[-1]:.6f}\n")

print("feature       trained    least squares")
weight = np.asarray(result.params.weight[0], np.float64)
for name, ours, theirs in zip(data.feature_names, weight, exact[:-1, 0], strict=True):
    print(f"{name:10}{ours:11.6f}{theirs:17.6f}")
# Three digits of every coefficient. Centred data leave nothing for the bias to do.
np.testing.assert_allclose(weight, exact[:-1, 0], rtol=5e-4)
assert abs(result.params.bias[0]) < 1e-6

# The targets have variance 1, so that the loss is the part left unexplained.
r_squared = 1 - jaxgrad.linear_loss(result.params, x, y)
r_squared_exact = 1 - jaxgrad.linear_loss(
    jaxgrad.LinearParams(exact[:-1].T, exact[-1]), x, y
)
print(f"\nR²: {r_squared:.6f} trained, {r_squared_exact:.6f} least squares")
np.testing.assert_allclose(r_squared, r_squared_exact, rtol=5e-4)
