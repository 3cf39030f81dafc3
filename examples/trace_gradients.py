"""Traces gradients: a NaN in Equinox, a dead leaf in Flax, and the lesson's neuron."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

import jaxgrad

x = jax.random.normal(jax.random.key(0), (16, 4))
y = jnp.sin(x.sum(axis=1, keepdims=True))


class Length(eqx.Module):
    """An Equinox model: the length of a projection, 0 for a row of padding."""

    project: eqx.nn.Linear

    def __call__(self, x):
        """The length for one row."""
        h = self.project(x)
        return jnp.where(jnp.all(x == 0), 0.0, jnp.sqrt(jnp.sum(h**2)))


def length_loss(model, x):
    return jnp.mean(jax.vmap(model)(x))


model = Length(eqx.nn.Linear(4, 3, use_bias=False, key=jax.random.key(1)))
padded = x.at[5].set(0.0)
trace = jaxgrad.trace_gradient(length_loss, model, padded)
origin = trace.first_nonfinite
print("Where does the NaN come from?")
print(f"  {origin.kind}, at {list(origin.index)}:\n  {origin.text}")
assert not trace
assert (origin.kind, origin.index) == ("norm at zero", (5,))


class Mended(Length):
    """Mended: the number is made safe before its root is taken."""

    def __call__(self, x):
        """The length for one row."""
        padding = jnp.all(x == 0)
        square = jnp.sum(self.project(x) ** 2)
        return jnp.where(padding, 0.0, jnp.sqrt(jnp.where(padding, 1.0, square)))


assert jaxgrad.trace_gradient(length_loss, Mended(model.project), padded)
print("  mended, the gradient is finite")


class Critic(nnx.Module):
    """A Flax model: its first layer starts so low that every unit is dead."""

    def __init__(self, rngs):
        self.first = nnx.Linear(
            4, 8, bias_init=nnx.initializers.constant(-50), rngs=rngs
        )
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        """The values of a batch."""
        return self.last(nnx.relu(self.first(x)))


def critic_loss(params, graph, x, y):
    return jaxgrad.mean_squared_error(nnx.merge(graph, params)(x), y)


graph, params = nnx.split(Critic(nnx.Rngs(0)))
trace = jaxgrad.trace_gradient(critic_loss, params, graph, x, y)
print("\nWhy is the gradient zero?")
for leaf, blocks in trace.blocked.items():
    for block in blocks:
        print(f"  {leaf}: {block.why}")
assert set(trace.blocked) == {
    f"{name}.value" for name in ("first.bias", "first.kernel", "last.kernel")
}
assert {block.reason for block in trace.blocked["first.bias.value"]} == {"flat"}


# The lesson's neuron, with a value and a gradient on every step, for a graph that
# GitHub and notebooks draw.
def neuron_loss(params, x, y):
    w1, w2, w3, b = params["w1"], params["w2"], params["w3"], params["b"]
    prediction = w1 * x[0] + w2 * x[1] + w3 * x[2] + b
    error = prediction - y
    return error**2


neuron = {"w1": 0.5, "w2": 0.4, "w3": 0.3, "b": 0.3}
neuron = jax.tree.map(jnp.asarray, neuron)
trace = jaxgrad.trace_gradient(neuron_loss, neuron, (1.0, 2.0, 3.0), 5.0)
print("\nThe chain rule, from the loss back to w3:")
slope = 1.0
for step in reversed(trace.steps):
    if step.operation in ("integer_pow", "sub") or "w3" in step.inputs:
        slope *= step.local_derivatives[0]
        print(f"  times {step.local_derivatives[0]:g}  ({step.operation})")
print(f"  is {slope:g}")
assert jnp.isclose(slope, trace.gradient["w3"])
print(f"\n{trace.to_mermaid()}")
