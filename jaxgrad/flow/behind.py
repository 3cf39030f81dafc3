"""What stands behind a number: a norm, a root, what softmax subtracts or divides by."""

from __future__ import annotations

from collections.abc import Iterator

from jaxgrad.equations import Node
from jaxgrad.flow.frames import Frame
from jaxgrad.flow.origins import Entry

_PASSED = (
    "stop_gradient",
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "convert_element_type",
    "select_n",
    "max",
    "transpose",
    "copy",
    "abs",
)


def is_softmax(entry: Entry, number: int) -> bool:
    """Whether a node subtracts a maximum, as softmax and log-softmax do."""
    node = entry.frame.node(number)
    return node.name == "sub" and "reduce_max" in _behind(entry.frame, node.operands[1])


def _behind(frame: Frame, variable: int) -> Iterator[str]:
    """What made a variable, through steps that only pass numbers on."""
    for _ in range(12):
        made = frame.graph.maker.get(variable)
        if made is None:
            outer = frame.outer
            if outer is None or outer.kind != "forward":
                return
            node = outer.frame.node(outer.number)
            if variable >= len(node.operands):
                return
            frame, variable = outer.frame, node.operands[variable]
            continue
        node = frame.node(made[0])
        yield node.name
        if node.name not in _PASSED:
            return
        inputs = [v for v in node.operands if frame.graph.inexact(v)]
        if not inputs:
            return
        makers = [v for v in inputs if v in frame.graph.maker]
        variable = (makers or inputs)[0]


def is_sum_of_exponentials(frame: Frame, variable: int) -> bool:
    """Whether a sum is one of exponentials, as softmax divides by it."""
    names = list(_behind(frame, variable))
    if "reduce_sum" not in names:
        return False
    found = _maker(frame, variable, "reduce_sum")
    if found is None:
        return False
    inner, node = found
    return "exp" in _behind(inner, node.operands[0])


def _maker(frame: Frame, variable: int, name: str) -> tuple[Frame, Node] | None:
    """The step of a name behind a variable, through steps that pass numbers on."""
    for _ in range(12):
        made = frame.graph.maker.get(variable)
        if made is None:
            return None
        node = frame.node(made[0])
        if node.name == name:
            return frame, node
        if node.name not in _PASSED:
            return None
        inputs = [v for v in node.operands if v in frame.graph.maker]
        if not inputs:
            return None
        variable = inputs[0]
    return None


def is_norm(frame: Frame, variable: int) -> bool:
    """Whether a variable is a sum of squares."""
    if _maker(frame, variable, "reduce_sum"):
        return True
    product = _maker(frame, variable, "dot_general")
    if product:
        return len(set(product[1].operands)) == 1
    total = _maker(frame, variable, "add")
    return total is not None and all(
        any(_maker(frame, v, name) for name in ("square", "integer_pow", "reduce_sum"))
        for v in total[1].operands
    )


def is_root(frame: Frame, variable: int) -> bool:
    """Whether a variable is a root, such as a norm or a standard deviation."""
    return "sqrt" in _behind(frame, variable)
