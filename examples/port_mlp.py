"""An MLP in PyTorch against two ports: a dict of arrays, and an Equinox module."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import torch

import jaxgrad

torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Linear(4, 16),
    torch.nn.ReLU(),
    torch.nn.Linear(16, 16),
    torch.nn.ReLU(),
    torch.nn.Linear(16, 3),
)
x = jax.random.normal(jax.random.key(0), (32, 4))
label = jax.random.randint(jax.random.key(1), (32,), 0, 3)


def torch_loss(module, x, label):
    return torch.nn.functional.cross_entropy(module(x), label)


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


# A list of dicts, whose kernels are (in, out): the transposes of PyTorch's weights.
def dict_loss(layers, x, label):
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return cross_entropy(x @ last["kernel"] + last["bias"], label)


widths = [4, 16, 16, 3]
layers = [
    {"kernel": jnp.zeros((n_in, n_out)), "bias": jnp.zeros(n_out)}
    for n_in, n_out in itertools.pairwise(widths)
]


# An Equinox module, whose weights are laid out as PyTorch's.
def equinox_loss(model, x, label):
    return cross_entropy(jax.vmap(model)(x), label)


mlp = eqx.nn.MLP(4, 3, width_size=16, depth=2, key=jax.random.key(2))

for name, loss, like in [
    ("A list of dicts", dict_loss, layers),
    ("An Equinox module", equinox_loss, mlp),
]:
    # The shapes (4, 16) and (16, 3) say how a weight is laid out; of (16, 16) the
    # report says by what custom it was settled.
    loaded = jaxgrad.load_torch_parameters(module.state_dict(), like)
    report = jaxgrad.compare_with_torch(
        loss, loaded.params, x, label, module=module, torch_loss=torch_loss
    )
    print(f"{name}\n\n{loaded}\n\n{report}\n")
    assert report
    layouts = {row.layout for row in report.parameters}
    assert ("transposed" in layouts) == (like is layers)
