"""Checks gradients: of an Equinox and a Flax model, a kernel, and one found by hand."""

import collections
import functools
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import pallas as pl

import jaxgrad

x = jax.random.normal(jax.random.key(0), (8, 3))
y = jnp.sin(x.sum(axis=1, keepdims=True))


def check(what, *loss_and_params, **options):
    report = jaxgrad.check_gradient(*loss_and_params, **options)
    said = [f"{leaf.path} {leaf.verdict}" for leaf in report.leaves]
    if len(said) > 2:
        verdicts = collections.Counter(leaf.verdict for leaf in report.leaves)
        said = [f"{count} leaves {verdict}" for verdict, count in verdicts.items()]
    print(f"{what:<17}  {', '.join(said)}")
    return report  # true if the gradient is right


# An Equinox model is checked as it is: each array of floats in it is a leaf.
def mlp_loss(model, x, y):
    return jaxgrad.mean_squared_error(jax.vmap(model)(x), y)


mlp = eqx.nn.MLP(3, 1, width_size=16, depth=2, key=jax.random.key(1))
assert check("Equinox MLP", mlp_loss, mlp, x, y)


# A Flax NNX model is split. Dropout's key and BatchNorm's statistics go in args.
def nnx_loss(weights, graph, rest, x, y):
    model = nnx.merge(graph, weights, rest, copy=True)
    return jaxgrad.mean_squared_error(model(x), y)


rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(3, 16, rngs=rngs),
    nnx.BatchNorm(16, rngs=rngs),
    nnx.relu,
    nnx.Dropout(0.1, rngs=rngs),
    nnx.Linear(16, 1, rngs=rngs),
)
graph, weights, rest = nnx.split(model, nnx.Param, ...)
assert check("Flax NNX model", nnx_loss, weights, graph, rest, x, y)


# A kernel can't be evaluated in float64: a plain `reference` says what it computes.
def silu_kernel(x_ref, out_ref):
    out_ref[:] = x_ref[:] * jax.nn.sigmoid(x_ref[:])


def silu_backward_kernel(width, x_ref, ct_ref, out_ref):
    s = jax.nn.sigmoid(x_ref[:])
    cotangent = ct_ref[:] * (s + x_ref[:] * s * (1 - s))
    out_ref[:] = jnp.where(jnp.arange(x_ref.size) < width, cotangent, 0)


def make_silu(width):
    @jax.custom_vjp
    def silu(x):
        return pl.pallas_call(silu_kernel, x, interpret=True)(x)

    def backward(x, ct):
        kernel = functools.partial(silu_backward_kernel, width)
        return (pl.pallas_call(kernel, x, interpret=True)(x, ct),)

    silu.defvjp(lambda x: (silu(x), x), backward)
    return silu


def gated(params, silu=jax.nn.silu):
    return jnp.mean(silu(params["gate"]) * params["value"])


params = {"gate": jnp.linspace(-2, 2, 6), "value": jnp.arange(1.0, 7.0)}
right, off_by_one = (functools.partial(gated, silu=make_silu(n)) for n in (6, 5))
assert check("a kernel", right, params, reference=gated)
kernel_report = check("kernel, one short", off_by_one, params, reference=gated)
assert kernel_report.leaves[0].cause.kind == "entries"

# The lesson: compute the gradient by hand, then verify it. It is given as values,
assert check("w squared", lambda w: w**2, 3.0, gradient=2 * 3.0)
neuron = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
example = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
by_hand = jaxgrad.LinearParams(jnp.array([[-5.0, -10.0, -15.0]]), jnp.array([-5.0]))
loss = jaxgrad.linear_loss
assert check("neuron, values", loss, neuron, *example, gradient=by_hand)


# or as a function: the error signal times the input, averaged over the batch.
def neuron_gradient(params, x, y, over_batch=jnp.mean):
    signal = 2 * (jaxgrad.linear(params, x) - y)
    each = jaxgrad.LinearParams(weight=signal[:, :, None] * x[:, None, :], bias=signal)
    return jax.tree.map(functools.partial(over_batch, axis=0), each)


summed = functools.partial(neuron_gradient, over_batch=jnp.sum)  # a mistake
assert check("neuron, function", loss, neuron, x, y, gradient=neuron_gradient)
summed_report = check("neuron, a sum", loss, neuron, x, y, gradient=summed)
cause = summed_report.leaves[0].cause
print(f"\n{textwrap.fill(cause.text, 80)}")
assert cause.kind == "factor"

print(f"\nThe whole report of the kernel that is one short:\n\n{kernel_report}")
