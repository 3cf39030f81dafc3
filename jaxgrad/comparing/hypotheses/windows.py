"""Convolutions and pools: what their windows see at the edges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
    said,
)


def convolution(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A convolution: its padding and stride."""
    import torch

    call_of = getattr(torch.nn.functional, name)
    axes = o["weight"].dim() - 2
    if "transpose" in name:
        for padding in range(4):
            if padding != o.get("padding"):
                text = f"has padding {o.get('padding', 0)}, JAX as with {padding}"
                yield Hypothesis("padding", text, given(padding=padding))
        spread = o.get("dilation", 1)
        reach = [
            (k - 1) * (spread if isinstance(spread, int) else spread[i])
            for i, k in enumerate(o["weight"].shape[2:])
        ]
        for pads in dict.fromkeys(p for p in c.paddings if len(p) == axes):
            # PyTorch's with no padding has windows that reach over either end.
            crops = [
                (low - r, high - r) for (low, high), r in zip(pads, reach, strict=True)
            ]

            def cropped(o: dict[str, Any], crops: Any = tuple(crops)) -> Any:
                flat = [n for pair in reversed(crops) for n in pair]
                whole = {**o, "padding": 0, "output_padding": 0, "bias": None}
                y = torch.nn.functional.pad(call_of(**whole), flat)
                bias = o.get("bias")
                return y if bias is None else y + bias.reshape(-1, *[1] * axes)

            text = f"has padding {o.get('padding', 0)}, JAX {said(pads)} before it"
            yield Hypothesis("padding", text, instead(cropped))
        return
    kernel = o["weight"].shape[2:]
    wider = [(k - 1) * 2 // 2 for k in kernel]
    tries = [p for p in dict.fromkeys(c.paddings) if len(p) == axes]
    tries += [tuple((p, p) for _ in kernel) for p in range(4)]
    tries += [tuple((w, 0) for w in wider), tuple((0, w) for w in wider)]
    for pads in dict.fromkeys(tries):
        flat = [n for pair in reversed(pads) for n in pair]
        for mode in ("constant", "reflect", "replicate", "circular"):

            def padded(
                o: dict[str, Any], flat: list[int] = flat, mode: str = mode
            ) -> Any:
                x = torch.nn.functional.pad(o["input"], flat, mode)
                return call_of(**{**o, "input": x, "padding": 0})

            text = f"pads its input by {o.get('padding', 0)}, JAX by {said(pads)}" + (
                "" if mode == "constant" else f" ({mode})"
            )
            if any(flat) or mode == "constant":
                yield Hypothesis("padding", text, instead(padded))
    for dilation in (1, 2, 3, 4):
        if o.get("dilation") not in (dilation, (dilation,) * axes):
            text = f"has dilation {o.get('dilation', 1)}, JAX {dilation}"
            for pads in dict.fromkeys(tries):
                flat = [n for pair in reversed(pads) for n in pair]

                def dilated(
                    o: dict[str, Any], flat: list[int] = flat, by: int = dilation
                ) -> Any:
                    x = torch.nn.functional.pad(o["input"], flat)
                    return call_of(**{**o, "input": x, "padding": 0, "dilation": by})

                how = f"{text}, and pads by {said(pads)}"
                yield Hypothesis("padding", how, instead(dilated))
    for stride in (1, 2):
        if o.get("stride") not in (stride, (stride,) * axes):
            text = f"has stride {o.get('stride', 1)}, JAX {stride}"
            yield Hypothesis("padding", text, given(stride=stride))


def pad(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A padding of another mode, or on the other side."""
    for mode in ("constant", "reflect", "replicate", "circular"):
        if mode != o.get("mode", "constant"):
            text = f"pads by {o.get('mode', 'constant')}, JAX by {mode}"
            yield Hypothesis("padding", text, given(mode=mode), True)
    pads = tuple(o["pad"])
    if len(pads) % 2 == 0:
        swapped = tuple(
            n for i in range(0, len(pads), 2) for n in pads[i : i + 2][::-1]
        )
        if swapped != pads:
            text = f"pads by {pads}, JAX by {swapped}"
            yield Hypothesis("padding", text, given(pad=swapped), True)


def pool(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A pool: its padding, or another pool."""
    import torch

    functional = torch.nn.functional
    if "avg" in name and "count_include_pad" in o:
        now = o["count_include_pad"]
        text = (
            f"{'counts' if now else 'leaves out'} the padding in its mean, JAX not so"
        )
        yield Hypothesis("padding", text, given(count_include_pad=not now))
    axes = o["input"].dim() - 2
    for pads in dict.fromkeys(p for p in c.paddings if len(p) == axes):
        flat = [n for pair in reversed(pads) for n in pair]
        for counted in (True, False):

            def pooled_padded(
                o: dict[str, Any], flat: list[int] = flat, counted: bool = counted
            ) -> Any:
                empty = 0.0 if "avg" in name else -math.inf
                rest = {k: v for k, v in o.items() if k != "return_indices"}

                def pool(x: Any, empty: float) -> Any:
                    x = functional.pad(x, flat, value=empty)
                    function = getattr(functional, name.replace("_with_indices", ""))
                    return function(**{**rest, "input": x, "padding": 0})

                y = pool(o["input"], empty)
                if counted or "max" in name:
                    return y
                return y / pool(torch.ones_like(o["input"]), 0.0)

            if "padding" in o:
                how = "" if counted else ", and leaves out the padding in its mean"
                text = f"pads its input by {o['padding']}, JAX by {said(pads)}{how}"
                yield Hypothesis("padding", text, instead(pooled_padded))
    if "avg" in name:
        text = "takes the mean of each window, JAX the sum"
        summed = lambda o: (  # noqa: E731
            getattr(functional, name)(**o) * _window(o, axes)
        )
        yield Hypothesis("reduction", text, instead(summed))
    other = name.replace("avg", "max") if "avg" in name else name.replace("max", "avg")
    other = other.replace("_with_indices", "")
    keep = ("input", "kernel_size", "stride", "padding", "ceil_mode", "output_size")
    pooled = lambda o: getattr(functional, other)(  # noqa: E731
        **{k: v for k, v in o.items() if k in keep}
    )
    yield Hypothesis("pooling", f"is {name}, JAX's {other}", instead(pooled))


def _window(o: dict[str, Any], axes: int) -> int:
    """How many numbers a pool's window has."""
    size = o.get("kernel_size")
    if size is None:
        return int(o["input"][0, 0].numel())
    return int(size**axes if isinstance(size, int) else math.prod(size))
