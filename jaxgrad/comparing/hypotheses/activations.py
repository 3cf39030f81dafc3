"""Activations, dropout and softmax: others, left out, over another axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    NAMES,
    Context,
    Hypothesis,
    given,
    instead,
)

DROPOUTS = (
    "dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
    "feature_alpha_dropout", "dropout_",
)  # fmt: skip


ACTIVATIONS = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "softplus",
    "mish", "hardswish", "relu6", "celu", "logsigmoid", "softsign", "hardtanh",
    "hardsigmoid", "rrelu", "relu_",
)  # fmt: skip


for _name in ACTIVATIONS:
    NAMES.setdefault(_name, ("input",))


def dropout(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """Dropout, left out."""
    if o.get("training", True) and o.get("p", 0.5):
        text = f"drops with p={o.get('p', 0.5):g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, instead(lambda o: o["input"] * 1), True)


def gelu(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """The other gelu."""
    now = o.get("approximate", "none")
    other = "tanh" if now == "none" else "none"
    said = {"none": "exact", "tanh": "the tanh approximation"}
    text = f"is {said[now]}, JAX's is {said[other]}"
    yield Hypothesis("gelu", text, given(approximate=other))

    def quick(o: dict[str, Any]) -> Any:
        return o["input"] * (1.702 * o["input"]).sigmoid()

    text = f"is {said[now]}, JAX's is x * sigmoid(1.702 x)"
    yield Hypothesis("gelu", text, instead(quick))


def activation(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """Another activation, or none."""
    import torch

    now = name.rstrip("_")
    functional = torch.nn.functional
    slopes = [x for x in dict.fromkeys([*c.literals, 0.01, 0.2, 0.1]) if 0 < x < 1]
    for other in ACTIVATIONS:
        if other != now and not other.endswith("_") and other != "rrelu":
            function = getattr(torch, other, None) or getattr(functional, other)
            text = f"is {now}, JAX's is {other}"

            def applied(o: dict[str, Any], function: Any = function) -> Any:
                return function(o["input"])

            yield Hypothesis("activation", text, instead(applied))
    text = f"is {now}, JAX's is gelu (tanh)"
    approximate = lambda o: functional.gelu(o["input"], approximate="tanh")  # noqa: E731
    yield Hypothesis("activation", text, instead(approximate))
    for slope in slopes:
        text = f"is {now}{_slope(o)}, JAX's is leaky_relu with a slope of {slope:g}"
        leaky = lambda o, s=slope: functional.leaky_relu(o["input"], s)  # noqa: E731
        yield Hypothesis("activation", text, instead(leaky))
    for alpha in dict.fromkeys([*c.literals, 1.0]):
        if alpha > 0:
            text = f"is {now}, JAX's is elu with alpha {alpha:g}"
            elu = lambda o, a=alpha: functional.elu(o["input"], a)  # noqa: E731
            yield Hypothesis("activation", text, instead(elu))
    text = f"is {now}, JAX has none here"
    yield Hypothesis("activation", text, instead(lambda o: o["input"] * 1), True)


def _slope(o: dict[str, Any]) -> str:
    slope = o.get("negative_slope")
    return f" with a slope of {slope:g}" if slope is not None else ""


def softmax(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A softmax over another axis."""
    rank = o["input"].dim()
    now = o.get("dim")
    if now is None:
        return
    for dim in range(rank):
        if dim != now % rank:
            text = f"is over axis {now}, JAX's over axis {dim}"
            yield Hypothesis("softmax_axis", text, given(dim=dim))
    text = f"takes a {name} over axis {now}, JAX has none here"
    yield Hypothesis("activation", text, instead(lambda o: o["input"] * 1), True)
