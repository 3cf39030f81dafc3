"""Which calls have which hypotheses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jaxgrad.comparing.hypotheses import (
    activations,
    arithmetic,
    attentions,
    layers,
    losses,
    norms,
    recurrence,
    windows,
)
from jaxgrad.comparing.hypotheses.base import Context, Hypothesis, exchanged, named
from jaxgrad.comparing.torch_side import Call, Rewrite, name_of


def hypotheses(call: Call, context: Context) -> Iterator[Hypothesis]:
    """What a call might have to be, the likeliest first."""
    name, operands = name_of(call[0]), named(call)
    if operands is None:
        return
    for applies, make in _TABLE:
        if name in applies:
            yield from make(name, operands, context)
    if name not in norms.NORMS:
        yield from exchanged(operands)


def rewrite(text: str, context: Context) -> Rewrite:
    """Changes a call as the hypothesis of that text says; others are left alone."""

    def change(call: Call) -> Call:
        for hypothesis in hypotheses(call, context):
            if hypothesis.text == text:
                return hypothesis.change(call)
        return call

    return change


_TABLE: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Hypothesis]]], ...] = (
    (norms.NORMS, norms.norm),
    (activations.DROPOUTS, activations.dropout),
    (("gelu",), activations.gelu),
    (("bilinear",), layers.bilinear),
    (("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
      "conv_transpose2d", "conv_transpose3d"), layers.weighted),
    (("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d"), windows.convolution),
    (activations.ACTIVATIONS, activations.activation),
    (("softmax", "log_softmax", "softmin"), activations.softmax),
    (("pad",), windows.pad),
    (("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool2d", "adaptive_max_pool2d"), windows.pool),
    (("scaled_dot_product_attention",), attentions.attention),
    (("multi_head_attention_forward",), attentions.multi_head),
    (("embedding",), layers.embedding),
    (("nll_loss",), losses.nll),
    (losses.LOSSES, losses.loss),
    (("mean", "sum"), arithmetic.mean),
    (("var", "std"), arithmetic.variance),
    (("add", "sub", "mul", "div", "true_divide", "__add__", "__sub__", "__mul__",
      "__truediv__", "__radd__", "__rmul__", "multiply"), arithmetic.arithmetic),
    (("masked_fill",), arithmetic.mask),
    (("lstm", "gru"), recurrence.recurrent),
)  # fmt: skip
