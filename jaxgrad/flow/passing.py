"""What a step lets through of a gradient, entry by entry, and why it lets none."""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal

import numpy as np

from jaxgrad.equations import bind, in_library, rule_place, run
from jaxgrad.flow.frames import Frame
from jaxgrad.flow.opening import backward_of, forward_of
from jaxgrad.flow.spread import at_hand, placed, space

Reason = Literal[
    "stop_gradient",
    "rounding",
    "argmax",
    "comparison",
    "integer cast",
    "flat",
    "maximum's loser",
    "saturation",
    "underflow",
    "branch not taken",
    "zero factor",
    "discarded",
    "cancellation",
    "at a minimum",
    "stationary",
    "custom rule",
]

EXPLAINED: dict[Reason, str] = {
    "stop_gradient": "lets no gradient through",
    "rounding": "is a staircase: its slope is zero everywhere",
    "argmax": "returns places, which have no slope",
    "comparison": "returns true or false, which has no slope",
    "integer cast": "returns integers, which have no slope",
    "flat": "is flat at every entry",
    "maximum's loser": "takes another number at every entry",
    "saturation": "is saturated: its slope rounds to zero",
    "underflow": "is so small that its slope, or a product, rounds to zero",
    "branch not taken": "takes the other branch at every entry",
    "zero factor": "multiplies it by zero",
    "discarded": "makes what the loss doesn't use",
    "cancellation": "is where the parts of its gradient cancel exactly",
    "at a minimum": "has the slope zero here, and the loss rises on all sides",
    "stationary": "has the slope zero here, which is no minimum of the loss",
    "custom rule": "has a hand-written rule that returns zero",
}


Reached = dict[int, Any]
"""Per variable that depends on the leaf: a mask of the entries that do."""


def nonzero(cotangent: Any) -> Any:
    """Which entries of a cotangent aren't zero; none if there is none."""
    return np.zeros((), bool) if cotangent is None else at_hand(cotangent) != 0


# Each output entry is one input entry, or none.
_MOVES = (
    "concatenate",
    "stack",
    "unstack",
    "tile",
    "pad",
    "slice",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "scatter",
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "rev",
    "expand_dims",
    "split",
    "copy",
    "select_n",
    "convert_element_type",
)
# Each output entry is a sum of input entries, times those of another input.
_SUMS = (
    "dot_general",
    "conv_general_dilated",
    "reduce_sum",
    "cumsum",
    "scatter-add",
    "scatter_add",
)
_BY_AXES = ("reduce_max", "reduce_min", "reduce_prod")


def dependent(
    frame: Frame, number: int, places: list[int], reached: Reached
) -> Reached:
    """Which entries of a step's outputs depend on the entries of its inputs."""
    node, graph = frame.node(number), frame.graph
    outputs = [v for v in node.outputs if graph.inexact(v)]
    masks = [reached.get(v) for v in node.operands]
    shapes = {np.shape(graph.avals[v]) for v in (*node.operands, *outputs)} - {()}
    if node.name in (*_MOVES, *_SUMS):
        rest = np.array(node.name in _SUMS)
        inputs = []
        for place, value in enumerate(frame.operands(number)):
            if not graph.inexact(node.operands[place]):
                inputs.append(value)
            else:
                mask = masks[place] if place in places else rest
                inputs.append(placed(_whole(mask, value.shape), value))
        with frame.by_steps():
            out = dict(zip(node.outputs, bind(node.eqn, inputs), strict=True))
        found = {v: at_hand(out[v]) for v in outputs}
        return {v: space(x).nan_to_num(x) != 0 for v, x in found.items()}
    if node.name in _BY_AXES:
        mask = masks[places[0]]
        assert mask is not None
        return {outputs[0]: mask.any(axis=tuple(node.eqn.params["axes"]))}
    whole = any(mask.all() for p in places if (mask := masks[p]) is not None)
    if len(shapes) == 1 and not whole and node.name not in _MIXING:
        each = [mask for p in places if (mask := masks[p]) is not None]
        (shape,) = shapes
        every = _whole(functools.reduce(operator.or_, each), shape)
        return dict.fromkeys(outputs, every)
    return {v: all_of(graph.avals[v].shape) for v in outputs}


def all_of(shape: tuple[int, ...]) -> Any:
    """A mask that is true everywhere, and takes no memory."""
    return np.broadcast_to(np.array(True), shape)


def _whole(mask: Any, shape: tuple[int, ...]) -> Any:
    return space(mask).broadcast_to(mask, shape)


# Of one shape, and yet each output entry depends on many input entries.
_MIXING = (
    "sort",
    "fft",
    "cumprod",
    "cummax",
    "cummin",
    "cumlogsumexp",
    "cholesky",
    "triangular_solve",
    "lu",
    "eigh",
    "scan",
    "cond",
    "while",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_linear_solve",
    "reduce_window",
    "reduce_window_max",
    "reduce_window_sum",
    "householder_product",
)


def contributes(frame: Frame, number: int, place: int, mask: Any) -> bool:
    """Whether a step lets any gradient through to some entries of an operand."""
    backward = backward_of(frame, number)
    if backward is None or place not in backward.operands:
        return False
    return bool((mask & nonzero(backward.contribution(place))).any())


# Steps through which a gradient may not come, whatever arrives.
_GATES = ("mul", "max", "min", "clamp", "logistic", "tanh", "exp", "exp2", "erf")


def is_blind(frame: Frame, number: int, place: int, reached: Reached) -> bool:
    """Whether a step would let nothing through, were a gradient of 1 to arrive."""
    node = frame.node(number)
    if not (node.name in _GATES or node.custom):
        return False
    added = _with(frame, number, place, _one)
    if added is None:  # what comes later stops it: nothing is asked of this step
        return False
    return not (reached[node.operands[place]] & nonzero(added)).any()


def _with(
    frame: Frame, number: int, place: int, arriving: Any, used: Any = None
) -> Any:
    """What a step adds to an operand's cotangent, were other numbers to arrive.

    And, with `used`, were its inputs others.
    """
    backward = backward_of(frame, number)
    if backward is None or place not in backward.operands:
        return None
    graph, count = backward.frame.graph, len(frame.node(number).operands)
    given = [
        placed(arriving(at_hand(x)), x) if i >= count
        else x if used is None else placed(used(at_hand(x)), x)
        for i, x in enumerate(backward.frame.values[: graph.inputs])
    ]  # fmt: skip
    with frame.by_steps():
        values = run(graph, given)
    return values[graph.results[backward.operands.index(place)]]


def _one(array: Any) -> Any:
    return space(array).ones_like(array)


# Slopes that are zero at a number, and not near it.
_BOTTOMS = ("square", "integer_pow", "abs", "pow", "cos", "cosh", "sin")
_WINNERS = ("reduce_max", "reduce_min", "cummax", "cummin", "sort", "top_k")
_LIMITED = ("logistic", "tanh", "erf", "erfc", "exp", "exp2", "expm1", "atan", "log1p")


def reason_of(frame: Frame, number: int, place: int, reached: Reached) -> Reason:
    """Why a step lets nothing through to an operand."""
    node = frame.node(number)
    mask = reached[node.operands[place]]
    if node.custom:
        names = {n.name for n in forward_of(frame, number).graph.nodes}
        if not in_library(rule_place(node.eqn).file):
            return "custom rule"
        flat = names & {"max", "min", "clamp"} and not names & {"exp", "log"}
        return "flat" if flat else "saturation"
    if node.name == "clamp":
        return "flat"
    if node.name in ("max", "min"):
        other = node.operands[1 - place]
        return "maximum's loser" if other in frame.moves else "flat"
    if node.name.startswith("reduce_window") or node.name in _WINNERS:
        return "maximum's loser"
    if node.name in ("mul", "dot_general", "conv_general_dilated"):
        return _of_product(frame, number, place, mask)
    if node.name == "div":
        above = at_hand(frame.values[node.operands[0]])
        return "zero factor" if place == 1 and not above.any() else "underflow"
    if node.name in ("exp", "exp2"):
        value = at_hand(frame.values[node.outputs[0]])
        return "underflow" if not value.any() else "saturation"
    if node.name in _LIMITED:
        return "saturation"
    if node.name in ("reduce_prod", "cumprod"):
        factors = at_hand(frame.values[node.operands[0]])
        return "underflow" if factors.all() else "zero factor"
    if node.name in (*_MOVES, *_SUMS, "add", "sub"):
        small = node.name == "convert_element_type"
        return "underflow" if small else "cancellation"
    if (mask & nonzero(_with(frame, number, place, _one))).any():
        return "underflow"
    return "at a minimum" if node.name in _BOTTOMS else "saturation"


def _of_product(frame: Frame, number: int, place: int, mask: Any) -> Reason:
    """Why a product lets nothing through: a zero factor, rounding, or a sum of zero."""
    node = frame.node(number)

    def passes(arriving: Any, used: Any) -> bool:
        return bool((mask & nonzero(_with(frame, number, place, arriving, used))).any())

    if len(set(node.operands[:2])) == 1:
        return "underflow" if passes(_one, None) else "at a minimum"
    if not passes(lambda x: x != 0, lambda x: x != 0):
        arrives = any(nonzero(frame.cotangents.get(v)).any() for v in node.outputs)
        if arrives or not passes(_one, lambda x: x != 0):
            return "zero factor"
    return "cancellation" if passes(abs, abs) else "underflow"
