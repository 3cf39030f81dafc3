"""Attention: masks, scales, heads, and the projections to q, k and v."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from jaxgrad.comparing.hypotheses.base import (
    Context,
    Hypothesis,
    given,
    instead,
    masks,
    permutations,
    rows_of,
)


def attention(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """PyTorch's scaled_dot_product_attention."""
    import torch

    width = o["query"].shape[-1]
    if o.get("dropout_p"):
        text = f"drops with p={o['dropout_p']:g}, JAX doesn't"
        yield Hypothesis("train_mode", text, given(dropout_p=0.0))
    mask = o.get("attn_mask")
    if mask is not None:
        for how, other in masks(mask):
            text = f"has a mask, JAX {how}"
            yield Hypothesis("mask", text, given(attn_mask=other))
    if o.get("is_causal"):
        shape = o["query"].shape[-2], o["key"].shape[-2]
        for how, other in masks(torch.ones(shape, dtype=torch.bool).tril()):
            text = f"has a causal mask, JAX {how}"
            yield Hypothesis("mask", text, given(attn_mask=other, is_causal=False))
    if mask is not None or o.get("is_causal"):
        text = "has a mask, JAX has none"
        yield Hypothesis("mask", text, given(attn_mask=None, is_causal=False))
    else:
        text = "has no mask, JAX a causal one"
        yield Hypothesis("mask", text, given(is_causal=True))
    for said, scale in scales(width, c):
        if not math.isclose(scale, o.get("scale") or width**-0.5, rel_tol=1e-5):
            text = f"scales its scores by {o.get('scale') or width**-0.5:g}, JAX {said}"
            yield Hypothesis("factor", text, given(scale=scale))
    for axis, said in ((-2, "the queries"), (-3, "the heads")):

        def over(o: dict[str, Any], axis: int = axis) -> Any:
            import torch

            q, k, v = o["query"], o["key"], o["value"]
            scores = q @ k.transpose(-1, -2) * (o.get("scale") or width**-0.5)
            mask = o.get("attn_mask")
            if o.get("is_causal"):
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            elif mask is not None:
                scores = scores + mask
            return scores.softmax(axis) @ v

        text = f"takes the softmax over the keys, JAX over {said}"
        yield Hypothesis("softmax_axis", text, instead(over))


def scales(width: int, c: Context) -> Iterator[tuple[str, float]]:
    """What scores may be multiplied by."""
    yield "not at all", 1.0
    for literal in c.literals:
        if literal > 0:
            yield f"by {literal:g}", literal
            yield f"by 1/{literal:g}", 1 / literal
    yield f"by 1/{width}", 1 / width


def multi_head(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """The whole of a MultiheadAttention, which PyTorch computes in one call."""
    import torch

    if o["training"] and o["dropout_p"]:
        text = f"drops with p={o['dropout_p']:g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, given(training=False))
    length = o["query"].shape[0]
    if o["attn_mask"] is None:
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        text = "has no mask, JAX a causal one"
        yield Hypothesis("mask", text, given(attn_mask=causal, is_causal=False))
    if o["attn_mask"] is not None or o["key_padding_mask"] is not None:
        text = "has a mask, JAX has none"
        for which, changed in (
            ("attn_mask", {"attn_mask": None, "is_causal": False}),
            ("key_padding_mask", {"key_padding_mask": None}),
            ("attn_mask and a key_padding_mask",
             {"attn_mask": None, "is_causal": False, "key_padding_mask": None}),
        ):  # fmt: skip
            text = f"has an {which}, JAX hasn't"
            yield Hypothesis("mask", text, given(**changed))
    for key in ("attn_mask", "key_padding_mask"):
        if o[key] is not None:
            for how, other in masks(o[key]):
                text = f"has an {key}, JAX {how}"
                yield Hypothesis("mask", text, given(**{key: other}))
    yield from _in_projection(o)
    out = o["out_proj_weight"]
    text = "multiplies by out_proj.weight, JAX by its transpose"
    yield Hypothesis("transposed", text, given(out_proj_weight=out.T))
    if o["out_proj_bias"] is not None:
        text = "adds out_proj.bias, JAX doesn't"
        yield Hypothesis("bias", text, given(out_proj_bias=None))
        text = "adds biases, JAX none"
        yield Hypothesis("bias", text, given(in_proj_bias=None, out_proj_bias=None))
    width = o["embed_dim_to_check"] // o["num_heads"]
    for said, scale in scales(width, c):
        factor = scale * width**0.5
        if not math.isclose(factor, 1, rel_tol=1e-5):
            text = f"scales its scores by {width**-0.5:g}, JAX {said}"
            by = lambda o, f=factor: (by_hand(o, scale=f), None)  # noqa: E731
            yield Hypothesis("factor", text, instead(by))
    axes = ("the keys", "the queries", "the heads", "the batch")
    for axis, said in zip((-1, -2, -3, -4), axes, strict=True):
        if axis != -1:
            text = f"takes the softmax over {axes[0]}, JAX over {said}"
            over = lambda o, a=axis: (by_hand(o, axis=a), None)  # noqa: E731
            yield Hypothesis("softmax_axis", text, instead(over))
    text = "has the numbers of each head together, JAX in turns"
    turns = lambda o: (by_hand(o, turns=True), None)  # noqa: E731
    yield Hypothesis("permuted", text, instead(turns))
    heads = o["num_heads"]
    for other in range(1, 2 * heads + 1):
        if other != heads and o["embed_dim_to_check"] % other == 0:
            text = f"has {heads} heads, JAX {other}"
            yield Hypothesis("heads", text, given(num_heads=other))


def _in_projection(o: dict[str, Any]) -> Iterator[Hypothesis]:
    """The projections to queries, keys and values, which are one array."""
    import torch

    rows = "qkv"
    weight, bias = o["in_proj_weight"], o["in_proj_bias"]
    if weight is None:
        return
    for order in permutations(3):
        new = "".join(rows[i] for i in order)
        changed = {"in_proj_weight": rows_of(weight, order)}
        text = f"has the weights in_proj in the order qkv, JAX as {new}"
        yield Hypothesis("swapped", text, given(**changed))
        if bias is not None:
            changed = {**changed, "in_proj_bias": rows_of(bias, order)}
            text = f"has weights and biases in_proj in the order qkv, JAX as {new}"
            yield Hypothesis("swapped", text, given(**changed))
    heads = o["num_heads"]
    for shape, said in (((heads, -1), "(size, heads)"), ((-1, heads), "(heads, size)")):
        # Rows that are taken for what they aren't, as they are loaded.
        turned = [b.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
                  for b in weight.chunk(3)]  # fmt: skip
        text = f"has the rows of in_proj head by head, JAX as {said}"
        yield Hypothesis("permuted", text, given(in_proj_weight=torch.cat(turned)))
        if bias is not None:
            parts = [b.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
                     for b in bias.chunk(3)]  # fmt: skip
            both = given(
                in_proj_weight=torch.cat(turned), in_proj_bias=torch.cat(parts)
            )
            yield Hypothesis("permuted", f"{text}, and its bias", both)
    some = [p for p in itertools.product((False, True), repeat=3) if any(p)]
    for chosen in some:
        which = ", ".join(r for r, yes in zip(rows, chosen, strict=True) if yes)
        blocks = zip(weight.chunk(3), chosen, strict=True)
        if weight.shape[0] == 3 * weight.shape[1]:
            weights = torch.cat([b.T if yes else b for b, yes in blocks])
            text = f"multiplies by in_proj, JAX by the transpose of its {which}"
            yield Hypothesis("transposed", text, given(in_proj_weight=weights))
        if bias is not None:
            pairs = zip(bias.chunk(3), chosen, strict=True)
            left = torch.cat([b * 0 if yes else b for b, yes in pairs])
            text = f"adds in_proj_bias, JAX doesn't to its {which}"
            yield Hypothesis("bias", text, given(in_proj_bias=left))


def by_hand(
    o: dict[str, Any], scale: float = 1.0, axis: int = -1, turns: bool = False
) -> Any:
    """`torch.nn.functional.multi_head_attention_forward`, with a twist.

    Args:
      o: its operands, by name; without dropout.
      scale: what the scores are multiplied by beside the usual.
      axis: that of the softmax.
      turns: the heads take the numbers in turns, not block by block.
    """
    import torch

    functional, heads = torch.nn.functional, o["num_heads"]
    sources = o["query"], o["key"], o["value"]
    weights = (
        o["in_proj_weight"].chunk(3) if o["in_proj_weight"] is not None
        else (o["q_proj_weight"], o["k_proj_weight"], o["v_proj_weight"])
    )  # fmt: skip
    biases = [None] * 3 if o["in_proj_bias"] is None else o["in_proj_bias"].chunk(3)
    parts = []
    for x, w, b in zip(sources, weights, biases, strict=True):
        y = functional.linear(x, w, b)
        y = y.unflatten(-1, (-1, heads) if turns else (heads, -1))
        parts.append((y.transpose(-1, -2) if turns else y).permute(1, 2, 0, 3))
    q, k, v = parts
    scores = q @ k.transpose(-1, -2) * (scale * q.shape[-1] ** -0.5)
    for mask in (o["attn_mask"], o["key_padding_mask"]):
        if mask is not None:
            full = mask[:, None, None] if mask is o["key_padding_mask"] else mask
            if full.dtype == torch.bool:
                scores = scores.masked_fill(full, -math.inf)
            else:
                scores = scores + full
    y = (scores.softmax(axis) @ v).permute(2, 0, 1, 3)
    y = (y.transpose(-1, -2) if turns else y).flatten(-2)
    return functional.linear(y, o["out_proj_weight"], o["out_proj_bias"])
