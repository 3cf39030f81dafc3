"""Means, variances, masks, and numbers that are added or multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
    masks,
    named,
)


def mean(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A mean that is a sum, or the reverse."""
    import torch

    other = {"mean": torch.sum, "sum": torch.mean}[name]
    text = f"takes the {name}, JAX the {'sum' if name == 'mean' else 'mean'}"
    yield Hypothesis("reduction", text, given(other))


def variance(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A variance by n, or by n - 1."""
    import torch

    now = o.get("correction", 1 if o.get("unbiased", True) else 0)
    other = 0 if now else 1
    said = {0: "by n (biased)", 1: "by n - 1 (unbiased)"}
    keep = {k: v for k, v in o.items() if k in ("input", "dim", "keepdim")}
    function = getattr(torch, name)
    text = f"divides {said.get(int(now or 0), '')}, JAX {said[other]}"
    if isinstance(o.get("dim"), bool):
        keep.pop("dim")
    changed = lambda call: (  # noqa: E731
        function, (), {
            **{k: v for k, v in (named(call) or {}).items() if k in keep},
            "correction": other,
        }
    )  # fmt: skip
    yield Hypothesis("variance", text, changed)


def arithmetic(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A number that is added or multiplied by."""
    import torch

    now = o["other"]
    if isinstance(now, torch.Tensor):
        if "mul" in name and now.detach().unique().numel() <= 2:
            same = instead(lambda o: o["input"] * torch.ones_like(o["other"]))
            yield Hypothesis("mask", "masks its values, JAX doesn't", same, True)
        return
    if isinstance(now, bool):
        return
    adds = "add" in name or "sub" in name
    for new in c.literals:
        if math.isclose(new, now, rel_tol=1e-6) or (not adds and new == 0):
            continue
        if adds and 0 < abs(now) < 0.1 and 0 <= new < 0.1:
            text = f"adds an epsilon of {now:g}, JAX one of {new:g}"
            yield Hypothesis("epsilon", text, given(other=new))
        elif not adds:
            text = f"has the factor {now:g} ({name.strip('_')}), JAX {new:g}"
            yield Hypothesis("factor", text, given(other=new))
            yield Hypothesis("factor", text, given(other=1 / new))


def mask(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A mask, left out, or of another value."""
    for said, other in masks(o["mask"]):
        text = f"masks its scores, JAX {said}"
        yield Hypothesis("mask", text, given(mask=other))
    text = "masks its scores, JAX doesn't"
    yield Hypothesis("mask", text, instead(lambda o: o["input"] * 1), True)
    for value in c.literals:
        if value < -1 and value != o["value"]:
            text = f"fills what is masked with {o['value']:g}, JAX with {value:g}"
            yield Hypothesis("mask", text, given(value=value))
