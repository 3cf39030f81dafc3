"""Norms: another epsilon, variance or mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
)

NORMS = ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm")


_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 1e-4, 0.0)


# By the batch's own statistics, with the running ones left alone.
_BY_BATCH: dict[str, Any] = {
    "training": True,
    "running_mean": None,
    "running_var": None,
}


_BATCH = {"train": "the batch's own mean and variance", "eval": "the running ones"}


def norm(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A norm: another epsilon, variance or mode."""
    import torch

    old = o.get("eps")
    small = [x for x in c.literals if 0 < x < 0.1]
    if name == "batch_norm":
        now, other = ("train", "eval") if o["training"] else ("eval", "train")
        text = (
            f"normalizes by {_BATCH[now]} (it's in {now} mode), JAX by {_BATCH[other]}"
        )
        if not o["training"]:
            yield Hypothesis("train_mode", text, given(**_BY_BATCH))
        elif o["running_mean"] is not None:
            yield Hypothesis("train_mode", text, given(training=False))
        if not o["training"]:
            mean, var = o["running_mean"], o["running_var"]
            text = (
                "normalizes by its running statistics, JAX by a mean of 0 and a "
                "variance of 1: they weren't copied"
            )
            fresh = {"running_mean": mean * 0, "running_var": var * 0 + 1}
            yield Hypothesis("values", text, given(**fresh))
    for eps in dict.fromkeys([*small, *_EPSILONS]):
        if old is None or not math.isclose(eps, old, rel_tol=1e-5):
            text = f"has an epsilon of {old:g}, JAX one of {eps:g}" if old else (
                f"has its default epsilon, JAX one of {eps:g}")  # fmt: skip
            trains = o["training"] if name == "batch_norm" else False
            changed: dict[str, Any] = {"eps": eps, **(_BY_BATCH if trains else {})}
            yield Hypothesis("epsilon", text, given(**changed))
    axes = _axes(name, o)
    if axes is None:
        return
    for eps in dict.fromkeys([old or 0.0, *small, *_EPSILONS]):
        for unbiased, outside in ((1, False), (1, True), (0, True)):
            what = "by n - 1 (unbiased)" if unbiased else "by n"
            where = ", and adds epsilon to the deviation" if outside else ""
            text = f"divides the variance by n (biased), JAX {what}{where}"
            if not unbiased:
                text = "adds epsilon to the variance, JAX to the deviation"
            if eps != old:
                text += f", with an epsilon of {eps:g}"

            def normed(
                o: dict[str, Any], u: int = unbiased, out: bool = outside,
                eps: float = eps,
            ) -> Any:  # fmt: skip
                x = o["input"]
                shape = x.shape
                if name == "group_norm":
                    x = x.reshape(shape[0], o["num_groups"], -1)
                by = _axes(name, o)
                mean = x.mean(by, keepdim=True)
                var = x.var(by, correction=u, keepdim=True)
                by_what = var.sqrt() + eps if out else (var + eps).sqrt()
                y = ((x - mean) / by_what).reshape(shape)
                weight, bias = o.get("weight"), o.get("bias")
                full = (
                    [1, -1] + [1] * (len(shape) - 2)
                    if name != "layer_norm" else list(o["normalized_shape"])
                )  # fmt: skip
                y = y if weight is None else y * weight.reshape(full)
                return y if bias is None else y + bias.reshape(full)

            kind = "variance" if unbiased else "epsilon"
            yield Hypothesis(kind, text, instead(normed))
    if name == "group_norm":

        def turned(o: dict[str, Any]) -> Any:
            x, groups = o["input"], o["num_groups"]
            y = x.unflatten(1, (-1, groups)).transpose(1, 2).reshape(x.shape)
            z = torch.nn.functional.group_norm(y, groups, eps=o["eps"])
            z = z.unflatten(1, (groups, -1)).transpose(1, 2).reshape(x.shape)
            full = [1, -1] + [1] * (x.dim() - 2)
            z = z if o.get("weight") is None else z * o["weight"].reshape(full)
            return z if o.get("bias") is None else z + o["bias"].reshape(full)

        text = "has the channels of a group together, JAX in turns"
        yield Hypothesis("permuted", text, instead(turned))
    if o.get("bias") is not None:
        yield Hypothesis("bias", "adds a bias, JAX doesn't", given(bias=None))
    if o.get("weight") is not None:
        text = "multiplies by a weight, JAX doesn't"
        yield Hypothesis("weight", text, given(weight=None))
    if name == "layer_norm":
        text = "takes the mean away (layer norm), JAX doesn't (RMS norm)"
        for eps in dict.fromkeys([old or 0.0, *small]):

            def rms(o: dict[str, Any], eps: float = eps) -> Any:
                y = torch.nn.functional.rms_norm(
                    o["input"], o["normalized_shape"], o.get("weight"), eps
                )
                return y if o.get("bias") is None else y + o["bias"]

            yield Hypothesis("variance", text, instead(rms))


def _axes(name: str, o: dict[str, Any]) -> tuple[int, ...] | None:
    rank = o["input"].dim()
    if name == "layer_norm":
        return tuple(range(rank - len(o["normalized_shape"]), rank))
    if name == "group_norm":
        return (2,)
    if name == "batch_norm" and o["training"]:
        return (0, *range(2, rank))
    if name == "instance_norm":
        return tuple(range(2, rank))
    return None
