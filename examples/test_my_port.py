"""Tests of a port, as they'd stand in a project of yours: `pytest` runs them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import jaxgrad


class TorchClassifier(torch.nn.Module):
    """What is ported."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.hidden = torch.nn.Linear(8, 8)
        self.output = torch.nn.Linear(8, 3)

    def forward(self, x):
        """The scores of a batch."""
        return self.output(torch.relu(self.hidden(self.norm(x))))


class Classifier(eqx.Module):
    """The port, for one example."""

    norm: eqx.nn.LayerNorm
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(8)
        self.hidden = eqx.nn.Linear(8, 8, key=key)
        self.output = eqx.nn.Linear(8, 3, key=key)

    def __call__(self, x):
        """The scores."""
        return self.output(jax.nn.relu(self.hidden(self.norm(x))))


def torch_loss(module, x, label):
    return torch.nn.functional.cross_entropy(module(x), label)


def loss(model, x, label):
    scores = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(scores, label).mean()


x = jax.random.normal(jax.random.key(0), (16, 8))
label = jnp.arange(16) % 3


@pytest.fixture
def module():
    torch.manual_seed(0)
    return TorchClassifier()


# The hidden weight is square, so that its shape doesn't say how it's laid out. With
# `verify`, PyTorch's loss does.
@pytest.fixture
def model(module):
    like = Classifier(jax.random.key(0))
    verify = (loss, (x, label), module, torch_loss)
    state = module.state_dict()
    return jaxgrad.load_torch_parameters(state, like, verify=verify).params


def test_the_gradients(module, model):
    report = jaxgrad.compare_with_torch(
        loss, model, x, label, module=module, torch_loss=torch_loss
    )
    assert report, str(report)  # the whole report is the message


def compare_adamw(module, model, **options):
    return jaxgrad.compare_with_torch(
        loss,
        model,
        x,
        label,
        module=module,
        torch_loss=torch_loss,
        steps=3,
        optimizer=optax.adamw(1e-3, **options),
        torch_optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3),
    )


# Unless one says, AdamW's weight decay is 0.01 in PyTorch and 0.0001 in optax.
def test_the_steps(module, model):
    report = compare_adamw(module, model, weight_decay=0.01)
    assert report, str(report)
    assert report.trajectory.steps == 3


def test_that_another_weight_decay_is_found(module, model):
    report = compare_adamw(module, model)
    assert not report
    assert [cause.kind for cause in report.causes] == ["weight_decay"]
