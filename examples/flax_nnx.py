"""A Flax NNX model with BatchNorm and Dropout, trained split and as a whole module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_wine

import jaxgrad

wine = load_wine()
x, label = jnp.asarray(wine.data, jnp.float32), jnp.asarray(wine.target)
bottles, features = x.shape


class Classifier(nnx.Module):
    """Normalised features, one hidden layer, one score per class."""

    def __init__(self, rngs):
        # Without memory, so that its statistics are those of the last batch it saw,
        # which here is all the data.
        self.norm = nnx.BatchNorm(features, momentum=0.0, rngs=rngs)
        self.hidden = nnx.Linear(features, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.output = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        """The scores of a batch."""
        return self.output(self.dropout(nnx.relu(self.hidden(self.norm(x)))))


def whole_loss(model, x, label):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), label).mean()


model = Classifier(nnx.Rngs(0))
how = {"steps": 300, "optimizer": optax.adam(1e-2)}

# Split: what is trained goes first. The statistics, and Dropout's key and counter, go
# in args. They are the same at every step, and so are the units that are dropped.
graph, weights, rest = nnx.split(model, nnx.Param, ...)


def split_loss(weights, rest, x, label):
    # A copy, since BatchNorm and Dropout write to the module that they are in, and
    # what a loss is given isn't its own.
    return whole_loss(nnx.merge(graph, weights, rest, copy=True), x, label)


split = jaxgrad.train(split_loss, weights, rest, x, label, **how)

# Whole: the module itself is the pytree. The key and the counter are held fixed. The
# statistics are arrays of floats, hence parameters, but a model in training mode
# doesn't read them: their gradient is 0.
gradient = jaxgrad.grad(whole_loss)(model, x, label)
in_parts = jaxgrad.grad(split_loss)(weights, rest, x, label)
assert gradient.dropout.rngs.key.get_value() is None
assert not gradient.norm.mean[...].any()
jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    nnx.state(gradient, nnx.Param),
    in_parts,
)
whole = jaxgrad.train(whole_loss, model, x, label, **how)


def accuracy(model):
    model.train()
    model(x)  # updates BatchNorm's statistics, in place
    model.eval()  # no units dropped, those statistics used
    return float(jnp.mean(model(x).argmax(axis=1) == label))


model_split = nnx.merge(graph, split.params, rest)
assert type(whole.params) is Classifier
print(f"{bottles} wines, {features} features, 3 classes")
for name, result, trained in [
    ("split", split, model_split),
    ("whole", whole, whole.params),
]:
    first, last = result.losses[0], result.losses[-1]
    right = accuracy(trained)
    print(f"{name}   loss {first:.4f} to {last:.6f}, accuracy {right:.1%}")
    assert last < 0.01 * first
    assert right > 0.95
