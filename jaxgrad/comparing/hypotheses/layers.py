"""Linear maps, convolutions and embeddings: their parameters turned or exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
    others,
    own_name,
    permutations,
    rows_of,
)


def weighted(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A linear map's or a convolution's parameters: turned, exchanged, left out."""
    import torch

    weight = o["weight"]
    own = own_name(o, "weight", c)
    rows = weight.shape
    if len(rows) >= 2 and rows[0] == rows[1]:
        text = f"multiplies by `{own}`, JAX by its transpose"
        yield Hypothesis("transposed", text, given(weight=weight.transpose(0, 1)))
    if len(rows) > 3 and rows[-1] == rows[-2]:
        text = f"has the kernel `{own}`, JAX has it with height and width exchanged"
        yield Hypothesis("transposed", text, given(weight=weight.transpose(-1, -2)))
    if len(rows) > 2:
        axes = tuple(range(2, len(rows)))
        text = f"slides the kernel `{own}` as it is (cross-correlation), JAX flipped"
        yield Hypothesis("permuted", text, given(weight=weight.flip(axes)))
    text = "takes its input channels in order, JAX in reverse"
    yield Hypothesis("permuted", text, given(weight=weight.flip(1)))
    if o.get("bias") is not None:
        text = "adds a bias, JAX doesn't"
        yield Hypothesis("bias", text, given(bias=None))
    for key in ("weight", "bias"):
        mine = own_name(o, key, c)
        for other, array in others(o, key, c):
            text = f"uses `{mine}` where JAX has the numbers of `{other}`"
            yield Hypothesis("swapped", text, given(**{key: array}))
            if key == "weight" and o.get("bias") is not None:
                bias = c.parameters.get(other.removesuffix("weight") + "bias")
                if bias is not None and bias.shape == o["bias"].shape:
                    text = f"uses `{mine}` and its bias where JAX has `{other}` and its"
                    yield Hypothesis("swapped", text, given(weight=array, bias=bias))
    if o.get("bias") is not None and rows[0] != len(o["bias"]):
        return
    for count in (2, 3, 4):
        for axis in (0, 1):
            if rows[axis] % count == 0 and rows[axis] > count:
                for order in permutations(count):
                    changed = {"weight": rows_of(weight, order, axis)}
                    if axis == 0 and o.get("bias") is not None:
                        changed["bias"] = rows_of(o["bias"], order)
                    which = "rows" if axis == 0 else "columns"
                    text = (
                        f"has the {count} blocks of {which} of `{own}` in order, JAX "
                        f"as {order}"
                    )
                    yield Hypothesis("permuted", text, given(**changed))
    groups = o.get("groups", 1)
    if groups > 1:
        each = rows[0] // groups
        for order, said in (
            (weight.reshape(groups, each, *rows[1:]).transpose(0, 1), "group by group"),
            (weight.reshape(each, groups, *rows[1:]).transpose(0, 1), "in turns"),
        ):
            text = f"has the output channels of its groups in order, JAX {said}"
            yield Hypothesis("permuted", text, given(weight=order.reshape(rows)))

        def regrouped(o: dict[str, Any], function: Any = None) -> Any:
            x = o["input"]
            y = x.reshape(len(x), -1, o["groups"], *x.shape[2:]).transpose(1, 2)
            return getattr(torch.nn.functional, name)(
                **{**o, "input": y.reshape(x.shape)}
            )

        def ungrouped(o: dict[str, Any]) -> Any:
            y = getattr(torch.nn.functional, name)(**{**o, "bias": None})
            z = y.reshape(len(y), o["groups"], -1, *y.shape[2:]).transpose(1, 2)
            z = z.reshape(y.shape)
            bias = o.get("bias")
            return z if bias is None else z + bias.reshape(-1, *[1] * (z.dim() - 2))

        text = "gives each group its input channels in order, JAX in turns"
        yield Hypothesis("permuted", text, instead(regrouped))
        text = "has the output channels group by group, JAX in turns"
        yield Hypothesis("permuted", text, instead(ungrouped))
    if len(rows) == 2:
        # A layer after a flattened image: channels last where PyTorch has them first.
        width = rows[1]
        for channels in range(2, width // 2 + 1):
            if width % channels == 0:
                order = weight.reshape(rows[0], channels, -1).transpose(1, 2)
                text = (
                    f"takes its {width} inputs as {channels} channels by "
                    f"{width // channels} places, JAX the places first"
                )
                changed_ = given(weight=order.reshape(rows))
                yield Hypothesis("permuted", text, changed_)


def bilinear(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A bilinear map."""
    own = own_name(o, "weight", c)
    if o["weight"].shape[1] == o["weight"].shape[2]:
        text = f"multiplies by `{own}`, JAX by its transpose (axes 1 and 2)"
        turned = given(weight=o["weight"].transpose(1, 2))
        yield Hypothesis("transposed", text, turned)
    if o.get("bias") is not None:
        yield Hypothesis("bias", "adds a bias, JAX doesn't", given(bias=None))


def embedding(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """An embedding: other rows, another table, a factor."""
    own = own_name(o, "weight", c)
    for other, array in others(o, "weight", c):
        text = f"looks up `{own}` where JAX has the numbers of `{other}`"
        yield Hypothesis("swapped", text, given(weight=array))
    rows = o["weight"].shape[0]
    for shift in (1, -1):
        index = (o["input"] + shift).clamp(0, rows - 1)
        text = f"looks up its rows, JAX those {'after' if shift > 0 else 'before'} them"
        yield Hypothesis("permuted", text, given(input=index))
    width = o["weight"].shape[1]
    for factor in (width**0.5, width**-0.5):
        scaled = o["weight"] * factor
        text = f"looks up its rows, JAX multiplies them by {factor:g}"
        yield Hypothesis("factor", text, given(weight=scaled))
