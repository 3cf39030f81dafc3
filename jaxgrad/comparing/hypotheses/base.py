"""What a hypothesis is, and how it changes a call's operands."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgrad.comparing.torch_side import Call, name_of


class Hypothesis(NamedTuple):
    """One change of a call.

    Attributes:
      kind: the cause's kind, if it fits.
      text: what it says of PyTorch and JAX, after the name of the module.
      change: makes the changed call of the call.
      blind: its result may stand in JAX for another reason: only a whole run tells.
      once: it holds for this call alone, and `change` makes it anew in another run.
      at: the record that it's about, if that isn't the call's own.
    """

    kind: str
    text: str
    change: Callable[[Call], Call]
    blind: bool = False
    once: bool = False
    at: int | None = None


@dataclass(frozen=True)
class Context:
    """What the hypotheses draw on.

    Attributes:
      literals: scalar constants of the JAX loss.
      paddings: the explicit paddings of JAX's convolutions and pools, per axis.
      parameters: the module's parameters, by name.
    """

    literals: Sequence[float]
    paddings: Sequence[tuple[tuple[int, int], ...]]
    parameters: Mapping[str, Any]


# The operands' names, where Python can't tell them.
NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose1d": (
        "input", "weight", "bias", "stride", "padding", "output_padding", "groups",
        "dilation",
    ),
    "gelu": ("input", "approximate"),
    "var": ("input", "dim", "unbiased", "keepdim"),
    "mean": ("input", "dim", "keepdim"),
    "softmax": ("input", "dim", "dtype"),
    "add": ("input", "other"),
    "masked_fill": ("input", "mask", "value"),
    "scaled_dot_product_attention": (
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal",
    ),
    "pad": ("input", "pad", "mode", "value"),
    "avg_pool1d": (
        "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
    ),
    "avg_pool2d": (
        "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "divisor_override",
    ),
    "bilinear": ("input1", "input2", "weight", "bias"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
}  # fmt: skip


for _alias, _like in {
    "conv2d": "conv1d", "conv3d": "conv1d", "conv_transpose2d": "conv_transpose1d",
    "conv_transpose3d": "conv_transpose1d", "std": "var", "sum": "mean",
    "log_softmax": "softmax", "sub": "add", "mul": "add", "div": "add",
    "true_divide": "add", "__truediv__": "add", "__add__": "add", "__mul__": "add",
    "__radd__": "add", "__rmul__": "add", "__sub__": "add", "multiply": "add",
}.items():  # fmt: skip
    NAMES[_alias] = NAMES[_like]


NAMES["lstm"] = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train",
    "bidirectional", "batch_first",
)  # fmt: skip


NAMES["gru"] = NAMES["rnn_tanh"] = NAMES["rnn_relu"] = NAMES["lstm"]


def named(call: Call) -> dict[str, Any] | None:
    """A call's operands by name; `None` where they can't be told."""
    func, args, kwargs = call
    name = name_of(func)
    try:
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        return {k: v for k, v in given.arguments.items() if not k.startswith("_")}
    except (TypeError, ValueError):
        pass
    names = NAMES.get(name)
    if names is None or len(args) > len(names):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def given(function: Callable[..., Any] | None = None, **changed: Any) -> Any:
    """The change of a call that gives some operands other values."""

    def change(call: Call) -> Call:
        operands = named(call)
        assert operands is not None
        return function or _by_name(call[0]), (), {**operands, **changed}

    return change


def _by_name(func: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's method as the function that takes its operands by name."""
    import torch

    if type(func).__name__ not in ("method_descriptor", "wrapper_descriptor"):
        return func
    name = name_of(func).strip("_")
    for spelled in (name, name.removeprefix("r"), "true_divide"):
        if hasattr(torch, spelled):
            return getattr(torch, spelled)  # type: ignore[no-any-return]
    return func


def instead(make: Callable[[dict[str, Any]], Any]) -> Callable[[Call], Call]:
    """The change of a call that computes something else of its operands."""

    def change(call: Call) -> Call:
        operands = named(call)
        assert operands is not None
        return (lambda: make(operands)), (), {}

    return change


def permutations(count: int) -> Iterator[tuple[int, ...]]:
    """All orders but the first."""
    for order in itertools.permutations(range(count)):
        if order != tuple(range(count)):
            yield order


def rows_of(tensor: Any, order: tuple[int, ...], axis: int = 0) -> Any:
    """A tensor with blocks of its rows, or of another axis, in another order."""
    import torch

    chunks = tensor.chunk(len(order), axis)
    return torch.cat([chunks[i] for i in order], axis)


def others(o: dict[str, Any], key: str, c: Context) -> Iterator[tuple[str, Any]]:
    """Other parameters that fit in the place of one."""
    own = o.get(key)
    if own is None:
        return
    for name, other in c.parameters.items():
        if other is not own and other.shape == own.shape:
            yield name, other


def own_name(o: dict[str, Any], key: str, c: Context) -> str:
    """The name of the parameter that a call is given."""
    for name, other in c.parameters.items():
        if other is o.get(key):
            return name
    return key


def said(pads: Sequence[tuple[int, int]]) -> str:
    """Paddings, in words."""
    return " and ".join(f"({low}, {high})" for low, high in dict.fromkeys(pads))


def masks(mask: Any) -> Iterator[tuple[str, Any]]:
    """Other masks than this one, of booleans or of numbers to add."""
    import torch

    if mask.dtype == torch.bool:
        yield "masks the others instead (the mask is inverted)", ~mask
    if mask.dim() >= 2:
        yield "has it shifted by one to the right", mask.roll(1, -1)
        yield "has it shifted by one to the left", mask.roll(-1, -1)
        size = mask.shape[-2:]
        for diagonal in (-1, 0, 1):
            lower = torch.ones(size, dtype=torch.bool).tril(diagonal)
            for kept, way in ((lower, "below"), (~lower, "above")):
                said = f"masks by what is {way} diagonal {diagonal}"
                if mask.dtype == torch.bool:
                    yield said, kept.expand(mask.shape)
                else:
                    full = torch.zeros(size, dtype=mask.dtype)
                    full = full.masked_fill(kept, -torch.inf)
                    yield said, full.expand(mask.shape)


def exchanged(o: dict[str, Any]) -> Iterator[Hypothesis]:
    """Two operands of one shape, each in the other's place."""
    import torch

    tensors = [k for k, x in o.items() if isinstance(x, torch.Tensor) and x.dim()]
    for one, two in itertools.combinations(tensors, 2):
        if o[one].shape == o[two].shape and o[one] is not o[two]:
            text = f"takes the {one} and the {two} as they are, JAX exchanged"
            swapped = given(**{one: o[two], two: o[one]})
            yield Hypothesis("swapped", text, swapped)
