"""A port to Flax whose loss looks right, and the two defaults that make it wrong."""

import functools

import jax
import optax
import torch
from flax import nnx
from torch.nn import functional as F

import jaxgrad


class Model(torch.nn.Module):
    """The next token, of one token."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(65, 32)
        torch.nn.init.normal_(self.embed.weight, std=0.02)  # as in GPT-2
        self.norm = torch.nn.LayerNorm(32)
        self.up = torch.nn.Linear(32, 128)
        self.down = torch.nn.Linear(128, 65)

    def forward(self, token):
        """The scores of each token of the vocabulary."""
        hidden = F.gelu(self.up(self.norm(self.embed(token))))
        return self.down(hidden)


class Port(nnx.Module):
    """The same, line by line."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(65, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 128, rngs=rngs)
        self.gelu = nnx.gelu
        self.down = nnx.Linear(128, 65, rngs=rngs)

    def __call__(self, token):
        """The scores of each token of the vocabulary."""
        hidden = self.gelu(self.up(self.norm(self.embed(token))))
        return self.down(hidden)


def torch_loss(module, token, label):
    return F.cross_entropy(module(token), label)


def loss(model, token, label):
    scores = model(token)
    return optax.softmax_cross_entropy_with_integer_labels(scores, label).mean()


torch.manual_seed(0)
module = Model()
port = jaxgrad.load_torch_parameters(module.state_dict(), Port(nnx.Rngs(0))).params
token, label = jax.random.randint(jax.random.key(0), (2, 256), 0, 65)


def compare():
    return jaxgrad.compare_with_torch(
        loss, port, token, label, module=module, torch_loss=torch_loss
    )


def answer(report):
    return str(report).split("\n\n")[0]


report = compare()
print(report)
# A person would call these losses equal.
assert abs(report.loss.jax - report.loss.torch) < 1e-3
assert report.first_difference.module == "norm"
assert report.causes[0].kind == "epsilon"

port.norm.epsilon = 1e-5
report = compare()
print(f"\nWith PyTorch's epsilon:\n\n{answer(report)}")
assert report.causes[0].kind == "gelu"

port.gelu = functools.partial(nnx.gelu, approximate=False)
report = compare()
print(f"\nWith PyTorch's GELU:\n\n{answer(report)}")
assert report
