"""Losses: reductions, smoothing, the softmax in a cross entropy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
)
from jaxgrad.comparing.torch_side import Call

LOSSES = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cross_entropy", "nll_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
    "poisson_nll_loss", "gaussian_nll_loss", "cosine_embedding_loss",
    "soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss",
    "triplet_margin_loss",
)  # fmt: skip


def loss(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A loss function's reduction and options."""
    reductions = [o.get("reduction", "mean")]
    reductions += [r for r in ("sum", "mean", "batchmean") if r not in reductions]
    if name != "kl_div":
        reductions = [r for r in reductions if r != "batchmean"]
    options: list[tuple[str, str, dict[str, Any]]] = [("", "", {})]
    if name == "cross_entropy":
        now = o["label_smoothing"]
        for new in dict.fromkeys([0.0, *c.literals, 0.1, 0.05, 0.2]):
            if 0 <= new < 1 and not math.isclose(new, now, abs_tol=1e-9):
                text = f"smooths its labels by {now:g}, JAX by {new:g}"
                options.append(("label_smoothing", text, {"label_smoothing": new}))
        yield from _cross_entropy(o, c)
        if o["weight"] is not None:
            options.append(
                ("factor", "weighs its classes, JAX doesn't", {"weight": None})
            )
        if o["ignore_index"] >= 0:
            text = f"leaves out the targets {o['ignore_index']}, JAX doesn't"
            options.append(("mask", text, {"ignore_index": -100}))
    for key in ("beta", "delta"):
        if key in o:
            for new in dict.fromkeys([*c.literals, 1.0]):
                if new > 0 and not math.isclose(new, o[key], rel_tol=1e-6):
                    text = f"has {key}={o[key]:g}, JAX as with {new:g}"
                    options.append(("factor", text, {key: new}))
    for key in ("pos_weight", "weight"):
        if o.get(key) is not None and name != "cross_entropy":
            options.append(("factor", f"has a {key}, JAX has none", {key: None}))
    if name == "kl_div":
        text = "takes its target as it is, JAX as a logarithm, or the reverse"
        options.append(("factor", text, {"log_target": not o["log_target"]}))
    for (kind, text, changed), reduction in itertools.product(options, reductions):
        if reduction == o.get("reduction", "mean"):
            if kind:
                yield Hypothesis(kind, text, given(**changed))
        else:
            said = f"takes the {reductions[0]} of its terms, JAX the {reduction}"
            said = f"{text}; it {said}" if text else said
            both = {**changed, "reduction": reduction, "reduce": None,
                    "size_average": None}  # fmt: skip
            both = {k: v for k, v in both.items() if k in o}
            yield Hypothesis(kind or "reduction", said, given(**both))
    if name in ("smooth_l1_loss", "huber_loss"):
        import torch

        other = "huber_loss" if name == "smooth_l1_loss" else "smooth_l1_loss"
        key, own = ("delta", "beta") if other == "huber_loss" else ("beta", "delta")
        for new in dict.fromkeys([o[own], *c.literals, 1.0]):
            if new > 0:
                text = (
                    f"is {name} with {own}={o[own]:g}, JAX's {other} with {key}={new:g}"
                )

                def swapped(o: dict[str, Any], new: float = new) -> Any:
                    rest = {"reduction": o["reduction"], key: new}
                    function = getattr(torch.nn.functional, other)
                    return function(o["input"], o["target"], **rest)

                yield Hypothesis("factor", text, instead(swapped))


def _cross_entropy(o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A cross entropy whose softmax or smoothing is another than PyTorch's."""
    import torch

    functional = torch.nn.functional
    x = o["input"]
    axis = 1 if x.dim() > 1 else 0
    classes = x.shape[axis]

    def with_logs(logs: Callable[[Any], Any]) -> Callable[[Call], Call]:
        # The log softmax of logarithms that sum to 1 is what they are; of others, what
        # is left is taken away.
        def change(o: dict[str, Any]) -> Any:
            y = logs(o["input"])
            rest = {k: v for k, v in o.items() if k != "input"}
            smooth = rest.pop("label_smoothing")
            rest.pop("reduce", None), rest.pop("size_average", None)
            if o["target"].is_floating_point():
                return -(y * o["target"]).sum(axis).mean()
            value = functional.nll_loss(y, **rest)
            return (1 - smooth) * value - smooth * y.mean(axis).mean()

        return instead(change)

    for dim in range(x.dim()):
        if dim != axis:
            text = f"takes the softmax over axis {axis}, JAX over axis {dim}"
            over = partial(torch.log_softmax, dim=dim)
            yield Hypothesis("softmax_axis", text, with_logs(over))
    count = len(x) if x.dim() == 2 else 0
    for outer in (n for n in range(2, count) if count % n == 0):
        # Rows of several examples, which JAX has as an axis of its own.
        for dim in (0, 1):

            def apart(x: Any, outer: int = outer, dim: int = dim) -> Any:
                return x.unflatten(0, (outer, -1)).log_softmax(dim).flatten(0, 1)

            text = (
                f"takes the softmax over the {classes} classes, JAX over axis {dim} of "
                f"({outer}, {count // outer}, {classes})"
            )
            yield Hypothesis("softmax_axis", text, with_logs(apart))
    text = "takes the softmax of the logits, JAX of their softmax"

    def twice(o: dict[str, Any]) -> Any:
        return functional.cross_entropy(**{**o, "input": o["input"].softmax(axis)})

    yield Hypothesis("activation", text, instead(twice))
    text = "takes the softmax of its input, JAX takes it for logarithms already"
    yield Hypothesis("activation", text, with_logs(lambda x: x))
    smooth = o["label_smoothing"] * classes / (classes - 1) if classes > 1 else 0
    if 0 < smooth < 1:
        text = "smooths over all classes, JAX over the others only"
        yield Hypothesis("label_smoothing", text, given(label_smoothing=smooth))


def nll(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A negative log likelihood whose weights are counted otherwise."""
    if o.get("weight") is not None:
        text = "divides by the sum of the weights, JAX by the number of targets"

        def by_count(o: dict[str, Any]) -> Any:
            import torch

            rest = {k: v for k, v in o.items() if k in ("input", "target", "weight")}
            total = torch.nn.functional.nll_loss(**rest, reduction="sum")
            return total / o["target"].numel()

        yield Hypothesis("reduction", text, instead(by_count))
