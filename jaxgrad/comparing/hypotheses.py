"""What PyTorch might have to compute otherwise, so that it gives what JAX does.

Each hypothesis changes one recorded call: another epsilon, the other gelu, no dropout.
They are tested elsewhere, by what the changed call gives.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgrad.comparing.torch_side import Call, Rewrite, name_of


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
_NAMES: dict[str, tuple[str, ...]] = {
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
    _NAMES[_alias] = _NAMES[_like]

_NORMS = ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm")
_DROPOUTS = (
    "dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
    "feature_alpha_dropout", "dropout_",
)  # fmt: skip
_ACTIVATIONS = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "selu", "softplus",
    "mish", "hardswish", "relu6", "celu", "logsigmoid", "softsign", "hardtanh",
    "hardsigmoid", "rrelu", "relu_",
)  # fmt: skip
_LOSSES = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cross_entropy", "nll_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
    "poisson_nll_loss", "gaussian_nll_loss", "cosine_embedding_loss", "soft_margin_loss",
    "hinge_embedding_loss", "margin_ranking_loss", "triplet_margin_loss",
)  # fmt: skip
for _name in _ACTIVATIONS:
    _NAMES.setdefault(_name, ("input",))
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 1e-4, 0.0)


def rewrite(text: str, context: Context) -> Rewrite:
    """Changes a call as the hypothesis of that text says; others are left alone."""

    def change(call: Call) -> Call:
        for hypothesis in hypotheses(call, context):
            if hypothesis.text == text:
                return hypothesis.change(call)
        return call

    return change


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
    names = _NAMES.get(name)
    if names is None or len(args) > len(names):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _with(function: Callable[..., Any] | None = None, **changed: Any) -> Any:
    """The change of a call that gives some operands other values."""

    def change(call: Call) -> Call:
        operands = named(call)
        assert operands is not None
        return (function or call[0], (), {**operands, **changed})

    return change


def _instead(make: Callable[[dict[str, Any]], Any]) -> Callable[[Call], Call]:
    """The change of a call that computes something else of its operands."""

    def change(call: Call) -> Call:
        operands = named(call)
        assert operands is not None
        return (lambda: make(operands)), (), {}

    return change


def hypotheses(call: Call, context: Context) -> Iterator[Hypothesis]:
    """What a call might have to be, the likeliest first."""
    name, operands = name_of(call[0]), named(call)
    if operands is None:
        return
    for applies, make in _TABLE:
        if name in applies:
            yield from make(name, operands, context)
    if name not in _NORMS:
        yield from _exchanged(operands)


def _exchanged(o: dict[str, Any]) -> Iterator[Hypothesis]:
    """Two operands of one shape, each in the other's place."""
    import torch

    tensors = [k for k, x in o.items() if isinstance(x, torch.Tensor) and x.dim()]
    for one, two in itertools.combinations(tensors, 2):
        if o[one].shape == o[two].shape and o[one] is not o[two]:
            text = f"takes the {one} and the {two} as they are, JAX exchanged"
            swapped = _with(**{one: o[two], two: o[one]})
            yield Hypothesis("swapped", text, swapped)


def _norm(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    import torch

    old = o.get("eps")
    small = [x for x in c.literals if 0 < x < 0.1]
    if name == "batch_norm":
        now, other = ("train", "eval") if o["training"] else ("eval", "train")
        text = (
            f"normalizes by {_BATCH[now]} (it's in {now} mode), JAX by {_BATCH[other]}"
        )
        if not o["training"]:
            yield Hypothesis("train_mode", text, _with(**_BY_BATCH))
        elif o["running_mean"] is not None:
            yield Hypothesis("train_mode", text, _with(training=False))
        if not o["training"]:
            mean, var = o["running_mean"], o["running_var"]
            text = (
                "normalizes by its running statistics, JAX by a mean of 0 and a "
                "variance of 1: they weren't copied"
            )
            fresh = {"running_mean": mean * 0, "running_var": var * 0 + 1}
            yield Hypothesis("values", text, _with(**fresh))
    for eps in dict.fromkeys([*small, *_EPSILONS]):
        if old is None or not math.isclose(eps, old, rel_tol=1e-5):
            text = f"has an epsilon of {old:g}, JAX one of {eps:g}" if old else (
                f"has its default epsilon, JAX one of {eps:g}")  # fmt: skip
            trains = o["training"] if name == "batch_norm" else False
            changed = {"eps": eps, **(_BY_BATCH if trains else {})}
            yield Hypothesis("epsilon", text, _with(**changed))
    axes = _norm_axes(name, o)
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
                by = _norm_axes(name, o)
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
            yield Hypothesis(kind, text, _instead(normed))
    if o.get("bias") is not None:
        yield Hypothesis("bias", "adds a bias, JAX doesn't", _with(bias=None))
    if o.get("weight") is not None:
        text = "multiplies by a weight, JAX doesn't"
        yield Hypothesis("weight", text, _with(weight=None))
    if name == "layer_norm":
        text = "takes the mean away (layer norm), JAX doesn't (RMS norm)"
        for eps in dict.fromkeys([old or 0.0, *small]):

            def rms(o: dict[str, Any], eps: float = eps) -> Any:
                y = torch.nn.functional.rms_norm(
                    o["input"], o["normalized_shape"], o.get("weight"), eps
                )
                return y if o.get("bias") is None else y + o["bias"]

            yield Hypothesis("variance", text, _instead(rms))


# By the batch's own statistics, with the running ones left alone.
_BY_BATCH = {"training": True, "running_mean": None, "running_var": None}
_BATCH = {"train": "the batch's own mean and variance", "eval": "the running ones"}


def _norm_axes(name: str, o: dict[str, Any]) -> tuple[int, ...] | None:
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


def _dropout(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    if o.get("training", True) and o.get("p", 0.5):
        text = f"drops with p={o.get('p', 0.5):g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, _instead(lambda o: o["input"] * 1), True)


def _gelu(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    now = o.get("approximate", "none")
    other = "tanh" if now == "none" else "none"
    said = {"none": "exact", "tanh": "the tanh approximation"}
    text = f"is {said[now]}, JAX's is {said[other]}"
    yield Hypothesis("gelu", text, _with(approximate=other))

    def quick(o: dict[str, Any]) -> Any:
        return o["input"] * (1.702 * o["input"]).sigmoid()

    text = f"is {said[now]}, JAX's is x * sigmoid(1.702 x)"
    yield Hypothesis("gelu", text, _instead(quick))


def _activation(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    import torch

    now = name.rstrip("_")
    functional = torch.nn.functional
    slopes = [x for x in dict.fromkeys([*c.literals, 0.01, 0.2, 0.1]) if 0 < x < 1]
    for other in _ACTIVATIONS:
        if other != now and not other.endswith("_") and other != "rrelu":
            function = getattr(torch, other, None) or getattr(functional, other)
            text = f"is {now}, JAX's is {other}"
            yield Hypothesis(
                "activation", text, _instead(lambda o, f=function: f(o["input"]))
            )
    text = f"is {now}, JAX's is gelu (tanh)"
    approximate = lambda o: functional.gelu(o["input"], approximate="tanh")  # noqa: E731
    yield Hypothesis("activation", text, _instead(approximate))
    for slope in slopes:
        text = f"is {now}{_slope(o)}, JAX's is leaky_relu with a slope of {slope:g}"
        leaky = lambda o, s=slope: functional.leaky_relu(o["input"], s)  # noqa: E731
        yield Hypothesis("activation", text, _instead(leaky))
    for alpha in dict.fromkeys([*c.literals, 1.0]):
        if alpha > 0:
            text = f"is {now}, JAX's is elu with alpha {alpha:g}"
            elu = lambda o, a=alpha: functional.elu(o["input"], a)  # noqa: E731
            yield Hypothesis("activation", text, _instead(elu))
    text = f"is {now}, JAX has none here"
    yield Hypothesis("activation", text, _instead(lambda o: o["input"] * 1), True)


def _slope(o: dict[str, Any]) -> str:
    slope = o.get("negative_slope")
    return f" with a slope of {slope:g}" if slope is not None else ""


def _softmax(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    rank = o["input"].dim()
    now = o.get("dim")
    if now is None:
        return
    for dim in range(rank):
        if dim != now % rank:
            text = f"is over axis {now}, JAX's over axis {dim}"
            yield Hypothesis("softmax_axis", text, _with(dim=dim))


def _permutations(count: int) -> Iterator[tuple[int, ...]]:
    for order in itertools.permutations(range(count)):
        if order != tuple(range(count)):
            yield order


def _rows(tensor: Any, order: tuple[int, ...], axis: int = 0) -> Any:
    import torch

    chunks = tensor.chunk(len(order), axis)
    return torch.cat([chunks[i] for i in order], axis)


def _others(o: dict[str, Any], key: str, c: Context) -> Iterator[tuple[str, Any]]:
    """Other parameters that fit in the place of one."""
    own = o.get(key)
    if own is None:
        return
    for name, other in c.parameters.items():
        if other is not own and other.shape == own.shape:
            yield name, other


def _own_name(o: dict[str, Any], key: str, c: Context) -> str:
    for name, other in c.parameters.items():
        if other is o.get(key):
            return name
    return key


def _weighted(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A linear map's or a convolution's parameters: turned, exchanged, left out."""
    import torch

    weight = o["weight"]
    own = _own_name(o, "weight", c)
    rows = weight.shape
    if len(rows) >= 2 and rows[0] == rows[1]:
        text = f"multiplies by `{own}`, JAX by its transpose"
        yield Hypothesis("transposed", text, _with(weight=weight.transpose(0, 1)))
    if len(rows) > 3 and rows[-1] == rows[-2]:
        text = f"has the kernel `{own}`, JAX has it with height and width exchanged"
        yield Hypothesis("transposed", text, _with(weight=weight.transpose(-1, -2)))
    if len(rows) > 2:
        axes = tuple(range(2, len(rows)))
        text = f"slides the kernel `{own}` as it is (cross-correlation), JAX flipped"
        yield Hypothesis("permuted", text, _with(weight=weight.flip(axes)))
    text = "takes its input channels in order, JAX in reverse"
    yield Hypothesis("permuted", text, _with(weight=weight.flip(1)))
    if o.get("bias") is not None:
        text = "adds a bias, JAX doesn't"
        yield Hypothesis("bias", text, _with(bias=None))
    for key in ("weight", "bias"):
        mine = _own_name(o, key, c)
        for other, array in _others(o, key, c):
            text = f"uses `{mine}` where JAX has the numbers of `{other}`"
            yield Hypothesis("swapped", text, _with(**{key: array}))
            if key == "weight" and o.get("bias") is not None:
                bias = c.parameters.get(other.removesuffix("weight") + "bias")
                if bias is not None and bias.shape == o["bias"].shape:
                    text = f"uses `{mine}` and its bias where JAX has `{other}` and its"
                    yield Hypothesis("swapped", text, _with(weight=array, bias=bias))
    if o.get("bias") is not None and rows[0] != len(o["bias"]):
        return
    for count in (2, 3, 4):
        for axis in (0, 1):
            if rows[axis] % count == 0 and rows[axis] > count:
                for order in _permutations(count):
                    changed = {"weight": _rows(weight, order, axis)}
                    if axis == 0 and o.get("bias") is not None:
                        changed["bias"] = _rows(o["bias"], order)
                    which = "rows" if axis == 0 else "columns"
                    text = (
                        f"has the {count} blocks of {which} of `{own}` in order, JAX "
                        f"as {order}"
                    )
                    yield Hypothesis("permuted", text, _with(**changed))
    groups = o.get("groups", 1)
    if groups > 1:
        each = rows[0] // groups
        for order, said in (
            (weight.reshape(groups, each, *rows[1:]).transpose(0, 1), "group by group"),
            (weight.reshape(each, groups, *rows[1:]).transpose(0, 1), "in turns"),
        ):
            text = f"has the output channels of its groups in order, JAX {said}"
            yield Hypothesis("permuted", text, _with(weight=order.reshape(rows)))

        def regrouped(o: dict[str, Any], function: Any = None) -> Any:
            x = o["input"]
            y = x.reshape(len(x), -1, o["groups"], *x.shape[2:]).transpose(1, 2)
            return getattr(torch.nn.functional, name)(**{**o, "input": y.reshape(x.shape)})

        def ungrouped(o: dict[str, Any]) -> Any:
            y = getattr(torch.nn.functional, name)(**{**o, "bias": None})
            z = y.reshape(len(y), o["groups"], -1, *y.shape[2:]).transpose(1, 2)
            z = z.reshape(y.shape)
            bias = o.get("bias")
            return z if bias is None else z + bias.reshape(-1, *[1] * (z.dim() - 2))

        text = "gives each group its input channels in order, JAX in turns"
        yield Hypothesis("permuted", text, _instead(regrouped))
        text = "has the output channels group by group, JAX in turns"
        yield Hypothesis("permuted", text, _instead(ungrouped))
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
                changed_ = _with(weight=order.reshape(rows))
                yield Hypothesis("permuted", text, changed_)


def _bilinear(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    own = _own_name(o, "weight", c)
    if o["weight"].shape[1] == o["weight"].shape[2]:
        text = f"multiplies by `{own}`, JAX by its transpose (axes 1 and 2)"
        turned = _with(weight=o["weight"].transpose(1, 2))
        yield Hypothesis("transposed", text, turned)
    if o.get("bias") is not None:
        yield Hypothesis("bias", "adds a bias, JAX doesn't", _with(bias=None))


def _conv(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    import torch

    call_of = getattr(torch.nn.functional, name)
    axes = o["weight"].dim() - 2
    if "transpose" in name:
        for padding in range(4):
            if padding != o.get("padding"):
                text = f"has padding {o.get('padding', 0)}, JAX as with {padding}"
                yield Hypothesis("padding", text, _with(padding=padding))
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

            text = (
                f"pads its input by {o.get('padding', 0)}, JAX by {_said(pads)}"
                + ("" if mode == "constant" else f" ({mode})")
            )
            if any(flat) or mode == "constant":
                yield Hypothesis("padding", text, _instead(padded))
    for stride in (1, 2):
        if o.get("stride") not in (stride, (stride,) * axes):
            text = f"has stride {o.get('stride', 1)}, JAX {stride}"
            yield Hypothesis("padding", text, _with(stride=stride))


def _said(pads: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"({low}, {high})" for low, high in dict.fromkeys(pads))


def _pad(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    for mode in ("constant", "reflect", "replicate", "circular"):
        if mode != o.get("mode", "constant"):
            text = f"pads by {o.get('mode', 'constant')}, JAX by {mode}"
            yield Hypothesis("padding", text, _with(mode=mode), True)
    pads = tuple(o["pad"])
    if len(pads) % 2 == 0:
        swapped = tuple(n for i in range(0, len(pads), 2) for n in pads[i : i + 2][::-1])
        if swapped != pads:
            text = f"pads by {pads}, JAX by {swapped}"
            yield Hypothesis("padding", text, _with(pad=swapped), True)


def _pool(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    import torch

    functional = torch.nn.functional
    if "avg" in name and "count_include_pad" in o:
        now = o["count_include_pad"]
        text = f"{'counts' if now else 'leaves out'} the padding in its mean, JAX not so"
        yield Hypothesis("padding", text, _with(count_include_pad=not now))
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
                text = f"pads its input by {o['padding']}, JAX by {_said(pads)}{how}"
                yield Hypothesis("padding", text, _instead(pooled_padded))
    if "avg" in name:
        text = "takes the mean of each window, JAX the sum"
        summed = lambda o: (  # noqa: E731
            getattr(functional, name)(**o) * _window(o, axes)
        )
        yield Hypothesis("reduction", text, _instead(summed))
    other = name.replace("avg", "max") if "avg" in name else name.replace("max", "avg")
    other = other.replace("_with_indices", "")
    keep = ("input", "kernel_size", "stride", "padding", "ceil_mode", "output_size")
    pooled = lambda o: getattr(functional, other)(  # noqa: E731
        **{k: v for k, v in o.items() if k in keep}
    )
    yield Hypothesis("pooling", f"is {name}, JAX's {other}", _instead(pooled))


def _window(o: dict[str, Any], axes: int) -> int:
    """How many numbers a pool's window has."""
    size = o.get("kernel_size")
    if size is None:
        return int(o["input"][0, 0].numel())
    return int(size**axes if isinstance(size, int) else math.prod(size))


def _attention(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    width = o["query"].shape[-1]
    if o.get("dropout_p"):
        text = f"drops with p={o['dropout_p']:g}, JAX doesn't"
        yield Hypothesis("train_mode", text, _with(dropout_p=0.0))
    if o.get("attn_mask") is not None or o.get("is_causal"):
        text = "has a mask, JAX has none"
        yield Hypothesis("mask", text, _with(attn_mask=None, is_causal=False))
    else:
        text = "has no mask, JAX a causal one"
        yield Hypothesis("mask", text, _with(is_causal=True))
    for said, scale in _scales(width, c):
        if not math.isclose(scale, o.get("scale") or width**-0.5, rel_tol=1e-5):
            text = f"scales its scores by {o.get('scale') or width**-0.5:g}, JAX {said}"
            yield Hypothesis("factor", text, _with(scale=scale))
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
        yield Hypothesis("softmax_axis", text, _instead(over))


def _scales(width: int, c: Context) -> Iterator[tuple[str, float]]:
    yield "not at all", 1.0
    for literal in c.literals:
        if literal > 0:
            yield f"by {literal:g}", literal
            yield f"by 1/{literal:g}", 1 / literal
    yield f"by 1/{width}", 1 / width


def _multi_head(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """The whole of a MultiheadAttention, which PyTorch computes in one call."""
    import torch

    if o["training"] and o["dropout_p"]:
        text = f"drops with p={o['dropout_p']:g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, _with(training=False))
    length = o["query"].shape[0]
    if o["attn_mask"] is None:
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        text = "has no mask, JAX a causal one"
        yield Hypothesis("mask", text, _with(attn_mask=causal, is_causal=False))
    if o["attn_mask"] is not None or o["key_padding_mask"] is not None:
        text = "has a mask, JAX has none"
        for which, changed in (
            ("attn_mask", {"attn_mask": None, "is_causal": False}),
            ("key_padding_mask", {"key_padding_mask": None}),
            ("attn_mask and a key_padding_mask",
             {"attn_mask": None, "is_causal": False, "key_padding_mask": None}),
        ):  # fmt: skip
            text = f"has an {which}, JAX hasn't"
            yield Hypothesis("mask", text, _with(**changed))
    yield from _in_projection(o)
    out = o["out_proj_weight"]
    text = "multiplies by out_proj.weight, JAX by its transpose"
    yield Hypothesis("transposed", text, _with(out_proj_weight=out.T))
    if o["out_proj_bias"] is not None:
        text = "adds out_proj.bias, JAX doesn't"
        yield Hypothesis("bias", text, _with(out_proj_bias=None))
        text = "adds biases, JAX none"
        yield Hypothesis("bias", text, _with(in_proj_bias=None, out_proj_bias=None))
    width = o["embed_dim_to_check"] // o["num_heads"]
    for said, scale in _scales(width, c):
        factor = scale * width**0.5
        if not math.isclose(factor, 1, rel_tol=1e-5):
            text = f"scales its scores by {width**-0.5:g}, JAX {said}"
            by = lambda o, f=factor: (multi_head(o, scale=f), None)  # noqa: E731
            yield Hypothesis("factor", text, _instead(by))
    axes = ("the keys", "the queries", "the heads", "the batch")
    for axis, said in zip((-1, -2, -3, -4), axes, strict=True):
        if axis != -1:
            text = f"takes the softmax over {axes[0]}, JAX over {said}"
            over = lambda o, a=axis: (multi_head(o, axis=a), None)  # noqa: E731
            yield Hypothesis("softmax_axis", text, _instead(over))
    text = "has the numbers of each head together, JAX in turns"
    turns = lambda o: (multi_head(o, turns=True), None)  # noqa: E731
    yield Hypothesis("permuted", text, _instead(turns))
    heads = o["num_heads"]
    for other in range(1, 2 * heads + 1):
        if other != heads and o["embed_dim_to_check"] % other == 0:
            text = f"has {heads} heads, JAX {other}"
            yield Hypothesis("heads", text, _with(num_heads=other))


def _in_projection(o: dict[str, Any]) -> Iterator[Hypothesis]:
    """The projections to queries, keys and values, which are one array."""
    import torch

    rows = "qkv"
    weight, bias = o["in_proj_weight"], o["in_proj_bias"]
    if weight is None:
        return
    for order in _permutations(3):
        new = "".join(rows[i] for i in order)
        changed = {"in_proj_weight": _rows(weight, order)}
        text = f"has the weights in_proj in the order qkv, JAX as {new}"
        yield Hypothesis("swapped", text, _with(**changed))
        if bias is not None:
            changed = {**changed, "in_proj_bias": _rows(bias, order)}
            text = f"has weights and biases in_proj in the order qkv, JAX as {new}"
            yield Hypothesis("swapped", text, _with(**changed))
    heads = o["num_heads"]
    for shape, said in (((heads, -1), "(size, heads)"), ((-1, heads), "(heads, size)")):
        # Rows that are taken for what they aren't, as they are loaded.
        turned = [b.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
                  for b in weight.chunk(3)]  # fmt: skip
        text = f"has the rows of in_proj head by head, JAX as {said}"
        yield Hypothesis("permuted", text, _with(in_proj_weight=torch.cat(turned)))
        if bias is not None:
            parts = [b.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
                     for b in bias.chunk(3)]  # fmt: skip
            both = _with(in_proj_weight=torch.cat(turned), in_proj_bias=torch.cat(parts))
            yield Hypothesis("permuted", f"{text}, and its bias", both)
    some = [p for p in itertools.product((False, True), repeat=3) if any(p)]
    for chosen in some:
        which = ", ".join(r for r, yes in zip(rows, chosen, strict=True) if yes)
        blocks = zip(weight.chunk(3), chosen, strict=True)
        if weight.shape[0] == 3 * weight.shape[1]:
            turned = torch.cat([b.T if yes else b for b, yes in blocks])
            text = f"multiplies by in_proj, JAX by the transpose of its {which}"
            yield Hypothesis("transposed", text, _with(in_proj_weight=turned))
        if bias is not None:
            parts = zip(bias.chunk(3), chosen, strict=True)
            left = torch.cat([b * 0 if yes else b for b, yes in parts])
            text = f"adds in_proj_bias, JAX doesn't to its {which}"
            yield Hypothesis("bias", text, _with(in_proj_bias=left))


def multi_head(
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


def _embedding(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    own = _own_name(o, "weight", c)
    for other, array in _others(o, "weight", c):
        text = f"looks up `{own}` where JAX has the numbers of `{other}`"
        yield Hypothesis("swapped", text, _with(weight=array))
    rows = o["weight"].shape[0]
    for shift in (1, -1):
        index = (o["input"] + shift).clamp(0, rows - 1)
        text = f"looks up its rows, JAX those {'after' if shift > 0 else 'before'} them"
        yield Hypothesis("permuted", text, _with(input=index))
    width = o["weight"].shape[1]
    for factor in (width**0.5, width**-0.5):
        scaled = o["weight"] * factor
        text = f"looks up its rows, JAX multiplies them by {factor:g}"
        yield Hypothesis("factor", text, _with(weight=scaled))


def _loss(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
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
            options.append(("factor", "weighs its classes, JAX doesn't", {"weight": None}))
        if 0 <= o["ignore_index"]:
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
                yield Hypothesis(kind, text, _with(**changed))
        else:
            said = f"takes the {reductions[0]} of its terms, JAX the {reduction}"
            said = f"{text}; it {said}" if text else said
            both = {**changed, "reduction": reduction, "reduce": None,
                    "size_average": None}  # fmt: skip
            both = {k: v for k, v in both.items() if k in o}
            yield Hypothesis(kind or "reduction", said, _with(**both))
    if name in ("smooth_l1_loss", "huber_loss"):
        import torch

        other = "huber_loss" if name == "smooth_l1_loss" else "smooth_l1_loss"
        key, own = ("delta", "beta") if other == "huber_loss" else ("beta", "delta")
        for new in dict.fromkeys([o[own], *c.literals, 1.0]):
            if new > 0:
                text = f"is {name} with {own}={o[own]:g}, JAX's {other} with {key}={new:g}"
                function = getattr(torch.nn.functional, other)
                swapped = lambda o, n=new: function(  # noqa: E731
                    o["input"], o["target"], reduction=o["reduction"], **{key: n}
                )
                yield Hypothesis("factor", text, _instead(swapped))


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

        return _instead(change)

    for dim in range(x.dim()):
        if dim != axis:
            text = f"takes the softmax over axis {axis}, JAX over axis {dim}"
            change = with_logs(lambda x, d=dim: x.log_softmax(d))
            yield Hypothesis("softmax_axis", text, change)
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
    twice = with_logs(lambda x: x.softmax(axis).log_softmax(axis))
    yield Hypothesis("activation", text, twice)
    text = "takes the softmax of its input, JAX takes it for logarithms already"
    yield Hypothesis("activation", text, with_logs(lambda x: x))
    smooth = o["label_smoothing"] * classes / (classes - 1) if classes > 1 else 0
    if 0 < smooth < 1:
        text = "smooths over all classes, JAX over the others only"
        yield Hypothesis("label_smoothing", text, _with(label_smoothing=smooth))


def _nll(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    if o.get("weight") is not None:
        text = "divides by the sum of the weights, JAX by the number of targets"

        def by_count(o: dict[str, Any]) -> Any:
            import torch

            rest = {k: v for k, v in o.items() if k in ("input", "target", "weight")}
            total = torch.nn.functional.nll_loss(**rest, reduction="sum")
            return total / o["target"].numel()

        yield Hypothesis("reduction", text, _instead(by_count))


def _mean(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    import torch

    other = {"mean": torch.sum, "sum": torch.mean}[name]
    text = f"takes the {name}, JAX the {'sum' if name == 'mean' else 'mean'}"
    yield Hypothesis("reduction", text, _with(other))


def _variance(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
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


def _arithmetic(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """A number that is added or multiplied by."""
    import torch

    now = o["other"]
    if isinstance(now, torch.Tensor):
        if "mul" in name and now.detach().unique().numel() <= 2:
            same = _instead(lambda o: o["input"] * torch.ones_like(o["other"]))
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
            yield Hypothesis("epsilon", text, _with(other=new))
        elif not adds:
            text = f"has the factor {now:g} ({name.strip('_')}), JAX {new:g}"
            yield Hypothesis("factor", text, _with(other=new))
            yield Hypothesis("factor", text, _with(other=1 / new))


def _mask(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    text = "masks its scores, JAX doesn't"
    yield Hypothesis("mask", text, _instead(lambda o: o["input"] * 1), True)
    for value in c.literals:
        if value < -1 and value != o["value"]:
            text = f"fills what is masked with {o['value']:g}, JAX with {value:g}"
            yield Hypothesis("mask", text, _with(value=value))


def _recurrent(name: str, o: dict[str, Any], c: Context) -> Iterator[Hypothesis]:
    """An LSTM or a GRU, which PyTorch computes in one call."""
    import torch

    letters = "ifgo" if name == "lstm" else "rzn"
    gates = len(letters)
    weights = o["params"]
    for order in _permutations(gates):
        new = "".join(letters[i] for i in order)
        text = f"has its gates in the order {letters}, JAX as {new}"
        changed = [_rows(w, order) for w in weights]
        yield Hypothesis("permuted", text, _with(params=changed))
    matrices = [i for i, w in enumerate(weights) if w.dim() == 2]
    biases = [i for i, w in enumerate(weights) if w.dim() == 1]
    both = (0, 1), "bias_ih and bias_hh"
    for which, said in (both, ((0,), "bias_ih"), ((1,), "bias_hh")):
        hit = {p for k, p in enumerate(biases) if k % 2 in which}
        left = [w * 0 if i in hit else w for i, w in enumerate(weights)]
        if biases:
            yield Hypothesis("bias", f"adds {said}, JAX doesn't", _with(params=left))
    if name == "gru" and biases:
        # b_hn stands inside of the product with the reset gate: moved out to b_in.
        moved = list(weights)
        for one, two in zip(biases[::2], biases[1::2], strict=True):
            mask = torch.zeros(3, 1, dtype=weights[one].dtype)
            mask[2] = 1
            mask = mask.expand(3, len(weights[one]) // 3).reshape(-1)
            moved[one] = weights[one] + mask * weights[two]
            moved[two] = weights[two] * (1 - mask)
        text = "multiplies b_hn by the reset gate, JAX adds it after that"
        yield Hypothesis("bias", text, _with(params=moved))
    for one, two in itertools.combinations(range(len(weights)), 2):
        if weights[one].shape == weights[two].shape:
            swapped = list(weights)
            swapped[one], swapped[two] = weights[two], weights[one]
            mine, other = (
                _own_name({"w": weights[i]}, "w", c) for i in (one, two)
            )
            text = f"uses `{mine}` where JAX has `{other}`, and the reverse"
            yield Hypothesis("swapped", text, _with(params=swapped))
    per_layer = len(weights) // max(1, o["num_layers"])
    for one, two in itertools.combinations(range(o["num_layers"]), 2):
        order = list(range(len(weights)))
        for k in range(per_layer):
            a, b = one * per_layer + k, two * per_layer + k
            order[a], order[b] = b, a
        layered = [weights[i] for i in order]
        if [w.shape for w in layered] == [w.shape for w in weights]:
            text = f"has the layers {one} and {two} in order, JAX exchanged"
            yield Hypothesis("swapped", text, _with(params=layered))
    for place in matrices:
        blocks = weights[place].chunk(gates)
        if blocks[0].shape[0] != blocks[0].shape[1]:
            continue
        for chosen in [*([i] for i in range(gates)), list(range(gates))]:
            turned = list(weights)
            turned[place] = torch.cat(
                [b.T if i in chosen else b for i, b in enumerate(blocks)]
            )
            which = "".join(letters[i] for i in chosen)
            own = _own_name({"w": weights[place]}, "w", c)
            text = f"multiplies by `{own}`, JAX by the transpose of its gates {which}"
            yield Hypothesis("transposed", text, _with(params=turned))
    if o.get("train") and o.get("dropout"):
        text = f"drops with p={o['dropout']:g} (it's in train mode), JAX doesn't"
        yield Hypothesis("train_mode", text, _with(train=False))


_NAMES["lstm"] = (
    "input", "hx", "params", "has_biases", "num_layers", "dropout", "train",
    "bidirectional", "batch_first",
)  # fmt: skip
_NAMES["gru"] = _NAMES["rnn_tanh"] = _NAMES["rnn_relu"] = _NAMES["lstm"]

_TABLE: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Hypothesis]]], ...] = (
    (_NORMS, _norm),
    (_DROPOUTS, _dropout),
    (("gelu",), _gelu),
    (("bilinear",), _bilinear),
    (("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
      "conv_transpose2d", "conv_transpose3d"), _weighted),
    (("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d"), _conv),
    (_ACTIVATIONS, _activation),
    (("softmax", "log_softmax", "softmin"), _softmax),
    (("pad",), _pad),
    (("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool2d", "adaptive_max_pool2d"), _pool),
    (("scaled_dot_product_attention",), _attention),
    (("multi_head_attention_forward",), _multi_head),
    (("embedding",), _embedding),
    (("nll_loss",), _nll),
    (_LOSSES, _loss),
    (("mean", "sum"), _mean),
    (("var", "std"), _variance),
    (("add", "sub", "mul", "div", "true_divide", "__add__", "__sub__", "__mul__",
      "__truediv__", "__radd__", "__rmul__", "multiply"), _arithmetic),
    (("masked_fill",), _mask),
    (("lstm", "gru"), _recurrent),
)  # fmt: skip
