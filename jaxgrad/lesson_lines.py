"""The lesson's lines, in PyTorch and in JAX side by side, and how they are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxgrad.comparing import TorchComparison, compare_with_torch

Figures: TypeAlias = dict[str, Any]
"""What each line gives, by the line's name: a number, or nested lists of numbers."""

Side: TypeAlias = Literal["torch", "jax"]

DEFAULTS: Mapping[str, Any] = {"learning_rate": 0.01, "steps": 1000, "tolerance": 1e-6}


@dataclass(frozen=True)
class Pair:
    """The same thing said in PyTorch and in JAX. The last line's value is the figure.

    Attributes:
      name: the figure's name.
      torch: PyTorch's lines.
      jax: JAX's lines.
      scale: the size of the numbers that the figure is computed from, where it is
        larger than the figure's own.
      per_step: the figure comes after many steps, each of which rounds.
      depends: the figure depends on the learning rate or on the number of steps.
      differs: the two libraries are meant to differ here.
    """

    name: str
    torch: str
    jax: str
    scale: float = 0.0
    per_step: bool = False
    depends: bool = False
    differs: bool = False


# In the order in which they run: a line sees the names that those above it have made.
PAIRS: tuple[Pair, ...] = (
    Pair(
        "limit",
        "w, h = torch.tensor(3.0), 0.001\n((w + h)**2 - w**2) / h",
        "w, h = jnp.float32(3.0), 0.001\n((w + h)**2 - w**2) / h",
        scale=9 / 0.001,  # a difference of two losses of 9, divided by h
    ),
    Pair(
        "square",
        "w = torch.tensor(3.0, requires_grad=True)\nloss = w**2\nloss",
        "loss = lambda w: w**2\nloss(3.0)",
    ),
    Pair("square_gradient", "loss.backward()\nw.grad", "jax.grad(loss)(3.0)"),
    Pair("square_compiled", "w.grad", "jax.jit(jax.grad(loss))(3.0)"),
    Pair(
        "square_checked",
        "w.grad",
        "value, gradient = jaxgrad.value_and_grad(loss)(3.0)\ngradient",
    ),
    Pair("square_below", "torch.tensor(2.9)**2", "loss(jnp.float32(2.9))"),
    Pair("square_above", "torch.tensor(3.1)**2", "loss(jnp.float32(3.1))"),
    Pair(
        "weight_shape",
        "neuron = torch.nn.Linear(3, 1)\nneuron.weight.shape",
        "params = jaxgrad.init_linear(jax.random.key(0), 3, 1)\nparams.weight.shape",
    ),
    Pair("bias_shape", "neuron.bias.shape", "params.bias.shape"),
    Pair(
        "parameter_count",
        "sum(p.numel() for p in neuron.parameters())",
        "sum(p.size for p in jax.tree.leaves(params))",
    ),
    Pair(
        "prediction",
        "neuron.weight.data = torch.tensor([[0.5, 0.4, 0.3]])\n"
        "neuron.bias.data = torch.tensor([0.3])\n"
        "x, y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0]])\n"
        "neuron(x)",
        "params = jaxgrad.LinearParams(\n"
        "    jnp.float32([[0.5, 0.4, 0.3]]), jnp.float32([0.3]))\n"
        "x, y = jnp.float32([[1.0, 2.0, 3.0]]), jnp.float32([[5.0]])\n"
        "jaxgrad.linear(params, x)",
    ),
    Pair(
        "loss",
        "mse = torch.nn.functional.mse_loss\nloss = mse(neuron(x), y)\nloss",
        "jaxgrad.linear_loss(params, x, y)",
    ),
    Pair(
        "weight_gradient",
        "loss.backward()\nneuron.weight.grad",
        "loss_gradient = jax.jit(jax.grad(jaxgrad.linear_loss))\n"
        "gradient = loss_gradient(params, x, y)\n"
        "gradient.weight",
    ),
    Pair("bias_gradient", "neuron.bias.grad", "gradient.bias"),
    Pair(
        "error_signal",
        "prediction = neuron(x)\n"
        "torch.autograd.grad(mse(prediction, y), prediction)[0]",
        "prediction = jaxgrad.linear(params, x)\n"
        "jax.grad(jaxgrad.mean_squared_error)(prediction, y)",
    ),
    Pair(
        "weight_after",
        "parameters = neuron.parameters()\n"
        "optimizer = torch.optim.SGD(parameters, lr=learning_rate)\n"
        "optimizer.step()\n"
        "neuron.weight",
        "state = jaxgrad.init_sgd(params)\n"
        "after, state = jaxgrad.sgd_update(params, grads=gradient,\n"
        "    state=state, learning_rate=learning_rate)\n"
        "after.weight",
        depends=True,
    ),
    Pair(
        "weight_after_optax",
        "neuron.weight",
        "optimizer = optax.sgd(learning_rate)\n"
        "updates, _ = optimizer.update(gradient, optimizer.init(params))\n"
        "optax.apply_updates(params, updates).weight",
        depends=True,
    ),
    Pair("bias_after", "neuron.bias", "after.bias", depends=True),
    Pair(
        "prediction_after",
        "neuron(x)",
        "jaxgrad.linear(after, x)",
        depends=True,
    ),
    Pair(
        "loss_after",
        "mse(neuron(x), y)",
        "jaxgrad.linear_loss(after, x, y)",
        scale=5.0**2,  # the square of a difference from the target, 5
        depends=True,
    ),
    Pair(
        "improvement",
        "loss - mse(neuron(x), y)",
        "value = jaxgrad.linear_loss\nvalue(params, x, y) - value(after, x, y)",
        scale=5.0**2,
        depends=True,
    ),
    Pair(
        "training_steps",
        "neuron.weight.data = torch.tensor([[0.5, 0.4, 0.3]])\n"
        "neuron.bias.data = torch.tensor([0.3])\n"
        "for step in range(steps + 1):\n"
        "    optimizer.zero_grad()\n"
        "    loss = mse(neuron(x), y)\n"
        "    if step == steps or loss < tolerance or not loss.isfinite():\n"
        "        break\n"
        "    loss.backward()\n"
        "    optimizer.step()\n"
        "step",
        "result = jaxgrad.train(jaxgrad.linear_loss, params, x, y,\n"
        "    steps=steps, learning_rate=learning_rate, tolerance=tolerance)\n"
        "result.steps",
        depends=True,
    ),
    Pair(
        "trained_weight",
        "neuron.weight",
        "result.params.weight",
        per_step=True,
        depends=True,
    ),
    Pair(
        "trained_prediction",
        "neuron(x)",
        "jaxgrad.linear(result.params, x)",
        per_step=True,
        depends=True,
    ),
    Pair(
        "accumulated",
        "neuron.weight.data = torch.tensor([[0.5, 0.4, 0.3]])\n"
        "neuron.bias.data = torch.tensor([0.3])\n"
        "neuron.zero_grad()\n"
        "mse(neuron(x), y).backward()\n"
        "mse(neuron(x), y).backward()\n"
        "neuron.weight.grad",
        "first = loss_gradient(params, x, y)\n"
        "second = loss_gradient(params, x, y)\n"
        "first.weight + second.weight",
    ),
    Pair(
        "zeroed",
        "neuron.zero_grad()\nmse(neuron(x), y).backward()\nneuron.weight.grad",
        "loss_gradient(params, x, y).weight",
    ),
    Pair(
        "page_prediction",
        "step = lambda rate: [p - rate * p.grad for p in neuron.parameters()]\n"
        "weight, bias = step(0.002)\n"
        "x @ weight.T + bias",
        "move = lambda rate: lambda p, g: p - rate * g\n"
        "step = lambda rate: jax.tree.map(move(rate), params, gradient)\n"
        "jaxgrad.linear(step(0.002), x)",
    ),
    Pair(
        "page_loss",
        "mse(x @ weight.T + bias, y)",
        "jaxgrad.linear_loss(step(0.002), x, y)",
        scale=5.0**2,
    ),
    Pair(
        "true_prediction",
        "weight, bias = step(0.01)\nx @ weight.T + bias",
        "jaxgrad.linear(step(0.01), x)",
    ),
    Pair(
        "true_loss",
        "mse(x @ weight.T + bias, y)",
        "jaxgrad.linear_loss(step(0.01), x, y)",
        scale=5.0**2,
    ),
    Pair(
        "second_backward_works",
        "loss = mse(neuron(x), y)\n"
        "loss.backward()\n"
        "try: loss.backward(); works = True\n"
        "except RuntimeError: works = False\n"
        "works",
        "bool((first.weight == second.weight).all())",
        differs=True,
    ),
)


def jax_figures(**options: Any) -> Figures:
    """Runs JAX's lines, with the options that `DEFAULTS` names."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxgrad

    scope = {"jax": jax, "jnp": jnp, "optax": optax, "jaxgrad": jaxgrad}
    # Highest: some devices would multiply float32 matrices in fewer digits.
    with jax.default_matmul_precision("highest"):
        return _run("jax", scope | options)


def live_torch(**options: Any) -> dict[str, Any]:
    """Runs PyTorch's lines: its version, the options, and the figures."""
    import torch

    version = torch.__version__.partition("+")[0]
    figures = _run("torch", {"torch": torch, **options})
    return {"torch": version, **options, "figures": figures}


def live_comparison(learning_rate: float) -> TorchComparison:
    """Compares the lesson's neuron with PyTorch's, whole."""
    import jax.numpy as jnp
    import optax
    import torch

    from jaxgrad.losses import linear_loss
    from jaxgrad.model import LinearParams

    neuron = torch.nn.Linear(3, 1)
    neuron.weight.data = torch.tensor([[0.5, 0.4, 0.3]])
    neuron.bias.data = torch.tensor([0.3])
    return compare_with_torch(
        linear_loss,
        LinearParams(jnp.float32([[0.5, 0.4, 0.3]]), jnp.float32([0.3])),
        jnp.float32([[1.0, 2.0, 3.0]]),
        jnp.float32([[5.0]]),
        module=neuron,
        torch_loss=lambda module, x, y: torch.nn.functional.mse_loss(module(x), y),
        steps=3,
        optimizer=optax.sgd(learning_rate),
        torch_optimizer=lambda ps: torch.optim.SGD(ps, lr=learning_rate),
    )


def recorded_torch() -> dict[str, Any]:
    """What `live_torch` gave at the defaults, as recorded.

    `python -m jaxgrad.lesson_lines` records it anew.
    """
    text = (resources.files("jaxgrad") / "lesson_torch.json").read_text("utf-8")
    record: dict[str, Any] = json.loads(text)
    return record


def _run(side: Side, scope: dict[str, Any]) -> Figures:
    """Runs one side's lines in order, so that what is shown is what ran."""
    figures = {}
    for pair in PAIRS:
        statements, _, last = str(getattr(pair, side)).rpartition("\n")
        exec(statements, scope)
        figures[pair.name] = _numbers(eval(last, scope))
    return figures


def _numbers(value: Any) -> Any:
    detach: Callable[[], Any] | None = getattr(value, "detach", None)
    return np.asarray(detach() if detach else value).tolist()


def _record() -> None:
    import os
    import pathlib

    path = pathlib.Path(__file__).with_name("lesson_torch.json")
    whole = path.with_suffix(".json.new")
    whole.write_text(json.dumps(live_torch(**DEFAULTS), indent=1) + "\n", "utf-8")
    os.replace(whole, path)


if __name__ == "__main__":
    _record()
