"""Three pictures, as files: `python examples/pictures.py FOLDER`."""

import pathlib
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp

import jaxgrad

given = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="pictures-")
folder = pathlib.Path(given)
folder.mkdir(parents=True, exist_ok=True)


def save(figure, name, says):
    figure.savefig(folder / name, dpi=100)
    print(f"{name:18}{says}")


# A gradient is a limit: the secants' slopes 8, 7, 6.5, 6.1 approach the tangent's, 6.
tangent = jaxgrad.plot_tangent(lambda w: w**2, 3.0)
*_, last = tangent.axes[0].get_legend().get_texts()
save(tangent, "tangent.png", last.get_text())
assert last.get_text() == "tangent: slope 6"

# Descent on the lesson's neuron. The third weight's gradient is 3 times the first's.
params = jaxgrad.LinearParams(
    weight=jnp.array([[0.5, 0.4, 0.3]]), bias=jnp.array([0.3])
)
x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
descent = jaxgrad.plot_descent(
    jaxgrad.linear_loss,
    params,
    x,
    y,
    entries=["weight[0][0]", "weight[0][2]"],
    learning_rate=0.01,
)
save(descent, "descent.png", descent.axes[0].get_title().splitlines()[0])

# Sigmoids pass on a quarter of a gradient at most: in the first layers little is left.
model = eqx.nn.MLP(3, 1, 16, depth=6, activation=jax.nn.sigmoid, key=jax.random.key(0))
inputs = jax.random.normal(jax.random.key(1), (32, 3))


def loss(model, x, y):
    return jaxgrad.mean_squared_error(jax.vmap(model)(x), y)


gradient = jaxgrad.grad(loss)(model, inputs, inputs.sum(axis=1, keepdims=True))
first, last = (jnp.linalg.norm(gradient.layers[k].weight) for k in (0, -1))
save(jaxgrad.plot_gradient_flow(gradient), "gradient_flow.png", "7 layers, vanishing")
assert first < 1e-3 * last
print("in", folder)
