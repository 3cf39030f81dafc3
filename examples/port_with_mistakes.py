"""A port with two famous mistakes: Flax's own defaults, which aren't PyTorch's."""

import jax
import optax
import torch
from flax import nnx

import jaxgrad

torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Embedding(65, 32),
    torch.nn.LayerNorm(32),
    torch.nn.Linear(32, 128),
    torch.nn.GELU(),
    torch.nn.Linear(128, 65),
)
torch.nn.init.normal_(module[0].weight, std=0.02)  # as in GPT-2


def torch_loss(module, token, label):
    return torch.nn.functional.cross_entropy(module(token), label)


def make_port(rngs, epsilon=1e-6, gelu=nnx.gelu):
    return nnx.Sequential(
        nnx.Embed(65, 32, rngs=rngs),
        nnx.LayerNorm(32, epsilon=epsilon, rngs=rngs),
        nnx.Linear(32, 128, rngs=rngs),
        gelu,
        nnx.Linear(128, 65, rngs=rngs),
    )


def loss(model, token, label):
    scores = model(token)
    return optax.softmax_cross_entropy_with_integer_labels(scores, label).mean()


token, label = jax.random.randint(jax.random.key(0), (2, 256), 0, 65)


def compare(model):
    loaded = jaxgrad.load_torch_parameters(module.state_dict(), model)
    return jaxgrad.compare_with_torch(
        loss, loaded.params, token, label, module=module, torch_loss=torch_loss
    )


report = compare(make_port(nnx.Rngs(0)))
print(report)
print([(c.kind,c.text) for c in report.causes])
report = compare(make_port(nnx.Rngs(0), epsilon=1e-5))
print(report)
print([(c.kind,c.text) for c in report.causes])
