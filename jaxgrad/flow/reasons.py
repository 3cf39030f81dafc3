"""Why a step made a number that isn't finite, in words, and what to write instead."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.equations import Node, Place, in_library, rule_place, source_of
from jaxgrad.flow.behind import (
    is_norm,
    is_root,
    is_softmax,
    is_sum_of_exponentials,
)
from jaxgrad.flow.frames import Frame
from jaxgrad.flow.opening import opens
from jaxgrad.flow.origins import Entry, Found, bad
from jaxgrad.flow.places import Spot, operation_of, spot_of
from jaxgrad.flow.repairs import REPAIRS, safe_code
from jaxgrad.flow.spread import pick

NonfiniteKind = Literal[
    "infinite slope",
    "norm at zero",
    "log of zero",
    "division by zero",
    "overflow",
    "domain",
    "equal eigenvalues",
    "singular matrix",
    "empty softmax",
    "out of range",
    "non-finite input",
    "custom rule",
    "other",
]


@dataclass(frozen=True)
class Origin(Spot):
    """The step that made the first number that isn't finite from finite ones.

    An input or a constant that isn't finite is the origin itself: the step is the first
    that uses it.

    Attributes:
      phase: whether the forward or the backward pass of the step made it.
      kind: a fixed word.
      reason: why, for a person.
      repair: what to write instead.
      index: of the entry in the array that it's in.
      name: of an input that isn't finite (`w`, `args[0]`) or a constant (`inf`); else
        empty.
      harmless: whether the loss and its gradient are finite all the same.
    """

    phase: Literal["forward", "backward"]
    kind: NonfiniteKind
    reason: str
    repair: str
    index: tuple[int, ...]
    name: str
    harmless: bool

    @property
    def sentence(self) -> str:
        """The whole, for a person."""
        where = f"{Place(self.function, self.file, self.line)}"
        inside = "" if self.iteration is None else f", iteration {self.iteration}"
        inside += "" if self.branch is None else f", branch {self.branch}"
        made = "comes into" if self.name else "is made in"
        return (
            f"The first number that isn't finite {made} the {self.phase} pass at "
            f"`{self.operation}` in {where}{inside}, entry {list(self.index)}: "
            f"{self.reason}"
        )


def explain(found: Found, *, harmless: bool) -> Origin:
    """Says in words what was found."""
    frame, number, entry = found.entry.frame, found.node, found.entry
    masked = found.given and np.isneginf(entry.value)
    if found.born and masked and is_softmax(*found.born):
        entry, number = found.born
        reason = (
            "every entry that softmax is taken over is -inf, so that its maximum is "
            "-inf too, and -inf - (-inf) is NaN: the mask leaves nothing."
        )
        why = _Why("empty softmax", reason)
        return _origin(entry.frame, number, "forward", why, entry, harmless)
    if found.given:
        return _given(found, harmless)
    outer = frame.outer
    if outer is None or outer.kind != "backward":
        return _of_value(frame, number, entry, harmless)
    step = outer.frame.node(outer.number)
    inner = frame.node(number)
    again = inner.name == step.name and all(
        v < len(step.operands) or v in frame.graph.constants for v in inner.operands
    )
    if again and not step.custom:
        # The step's own value, which its backward pass uses.
        return _of_value(frame, number, entry, harmless)
    why = _backward(frame, number, entry)
    return _origin(frame, number, "backward", why, entry, harmless)


class _Why(NamedTuple):
    """Why a number isn't finite.

    Attributes:
      kind: a fixed word.
      reason: a sentence.
      repair: which repair, if not that of the kind.
    """

    kind: NonfiniteKind
    reason: str
    repair: str = ""


def _of_value(frame: Frame, number: int, entry: Entry, harmless: bool) -> Origin:
    why = _forward(frame, number, entry.at)
    where = frame
    if frame.outer is not None and frame.outer.kind == "backward":
        where, number_there = frame.outer.frame, frame.outer.number
    else:
        number_there = number
    if _sound(where):
        kept = _dropped_by(where, number_there, entry.at)
        if kept:
            repair = "dropped overflow" if why.kind == "overflow" else why.repair
            why = _Why(why.kind, why.reason + kept, repair)
    return _origin(frame, number, "forward", why, entry, harmless)


def _sound(frame: Frame) -> bool:
    """Whether the loss is finite: then what isn't was dropped."""
    while frame.outer is not None:
        frame = frame.outer.frame
    return not bad(frame.values[frame.graph.results[0]])


def _origin(
    frame: Frame,
    number: int,
    phase: Literal["forward", "backward"],
    why: _Why,
    entry: Entry,
    harmless: bool,
    name: str = "",
) -> Origin:
    spot = spot_of(frame, number)
    repair = REPAIRS.get(why.repair or why.kind, "")
    if not repair and why.kind not in ("other",):
        value = entry.frame.values[entry.variable]
        repair = safe_code(
            spot.operation, spot.text, is_complex=jnp.iscomplexobj(value)
        )
    return Origin(
        **vars(spot),
        phase=phase,
        kind=why.kind,
        reason=why.reason,
        repair=repair,
        index=entry.at,
        name=name,
        harmless=harmless,
    )


def _given(found: Found, harmless: bool) -> Origin:
    entry = found.entry
    frame, name = entry.frame, entry.frame.name_of(entry.variable)
    number = frame.graph.users.get(entry.variable, (found.node,))[0]
    where = f" at {list(entry.at)}" if entry.at else ""
    kind: NonfiniteKind = "non-finite input"
    reason, repair = f"`{name}` is {entry.value}{where} already", ""
    phase: Literal["forward", "backward"] = "forward"
    literal = entry.variable in frame.graph.literals
    spot = spot_of(frame, number)
    if frame.outer is not None and frame.outer.kind == "backward":
        phase = "backward"
        if frame.outer.frame.node(frame.outer.number).custom:
            kind, repair = "custom rule", "custom rule"
    elif literal and not any(word in spot.text for word in ("inf", "nan")):
        reason = f"`{name}`, which a library starts from, is left: nothing replaced it"
        repair = "nothing to take"
    elif literal:
        repair = "literal"
    elif frame.outer is None and entry.variable in frame.moving:
        repair = "parameter"
    if found.born:
        nan, made = found.born
        node = nan.frame.node(made)
        line = source_of(*node.lines)
        reason += f", and `{operation_of(node)}` in {line} makes NaN of it"
    why = _Why(kind, f"{reason}.", repair)
    return _origin(frame, number, phase, why, entry, harmless, name)


def _operands_at(
    frame: Frame, number: int, index: tuple[int, ...]
) -> list[float | None]:
    """The numbers that an entry of an output is made of, one of each operand."""
    node = frame.node(number)
    if node.name not in _BY_ENTRY:
        return [None] * len(node.operands)
    numbers: list[float | None] = []
    for x in frame.operands(number):
        shape = np.shape(x)
        fits = shape == () or _within(index, shape)
        if fits and not jnp.issubdtype(x.dtype, jnp.complexfloating):
            numbers.append(float(pick(x, index if shape else ())))
        else:
            numbers.append(None)
    return numbers


def _within(index: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(shape) == len(index) and all(map(operator.lt, index, shape))


_SLOPED = {
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "cbrt": "cbrt",
    "pow": "a power under 1",
    "acos": "arccos",
    "asin": "arcsin",
    "acosh": "arccosh",
    "atanh": "arctanh",
}

_DOMAINS = {
    "log": "of a negative number",
    "log1p": "of a number under -1",
    "sqrt": "of a negative number",
    "rsqrt": "of a negative number",
    "acos": "of a number outside of [-1, 1]",
    "asin": "of a number outside of [-1, 1]",
    "acosh": "of a number under 1",
    "atanh": "of a number that isn't inside of (-1, 1)",
    "erf_inv": "of a number that isn't inside of (-1, 1)",
    "pow": "of a negative number to a power that is no integer",
    "lgamma": "at a pole: 0 or a negative integer",
    "digamma": "at a pole: 0 or a negative integer",
}

_BY_ENTRY = (
    *_DOMAINS,
    *_SLOPED,
    "div",
    "rem",
    "integer_pow",
    "atan2",
)

_MATRICES = ("lu", "triangular_solve", "custom_linear_solve", "slogdet", "inv", "det")

_EIGEN = ("eigh", "svd", "eig", "schur")


def _forward(frame: Frame, number: int, index: tuple[int, ...]) -> _Why:
    """Why a step's value isn't finite, though its inputs are."""
    node = frame.node(number)
    name, numbers = node.name, _operands_at(frame, number, index)
    x = numbers[0] if numbers else None
    y = numbers[1] if len(numbers) > 1 else None
    if _in_a_derivative(node) and name in ("div", "integer_pow", "rsqrt", "pow"):
        why = "a derivative that the loss itself takes of this line divides by 0."
        return _Why("infinite slope", why, "root")
    for matrix in (name, *_callers_of(frame)):
        if matrix in _MATRICES:
            return _Why("singular matrix", f"`{matrix}` of a matrix that is singular.")
    if name in ("log", "log1p") and x == (0 if name == "log" else -1):
        if is_sum_of_exponentials(frame, node.operands[0]):
            return _Why(
                "empty softmax",
                "every entry that logsumexp is taken over is -inf, so that it is the "
                "log of 0: the mask leaves nothing.",
            )
        return _Why("log of zero", f"`{name}` at {x:g} is -inf.")
    if name == "div" and y == 0:
        if is_sum_of_exponentials(frame, node.operands[1]):
            return _Why(
                "empty softmax",
                "the sum that softmax divides by is 0: the mask leaves nothing.",
            )
        what = "NaN" if x == 0 else "infinite"
        over = "0 / 0" if x == 0 else f"{_num(x)} / 0"
        root = is_root(frame, node.operands[1])
        return _Why("division by zero", f"{over} is {what}.", "root" if root else "")
    if name == "rem" and y == 0:
        return _Why("division by zero", "a remainder of a division by 0 is NaN.")
    if name == "rsqrt" and x == 0:
        return _Why("division by zero", "`rsqrt` at 0 is 1 / 0.")
    if name == "integer_pow" and x == 0:
        power = node.eqn.params["y"]
        return _Why("division by zero", f"0 to the power {power} is 1 / 0.")
    if name == "pow" and x == 0:
        return _Why("division by zero", f"0 to the power {y:.3g} is 1 / 0.")
    if name == "pow" and x is not None and x > 0:
        return _overflow(frame, node)
    if name == "cholesky":
        reason = "`cholesky` of a matrix that isn't positive definite."
        return _Why("domain", reason, "singular matrix")
    if name in _DOMAINS:
        at = f", here {x:.6g}" if x is not None else ""
        return _Why("domain", f"`{name}` {_DOMAINS[name]}{at}.")
    if name in ("gather", "dynamic_slice"):
        return _Why(
            "out of range",
            "an index is outside of the array, and what is read there is NaN.",
        )
    if name in _EIGEN:
        return _Why("other", f"`{name}` didn't converge.")
    if opens(node):
        return _Why("other", f"`{operation_of(node)}` makes it of finite numbers.")
    return _overflow(frame, node)


def _in_a_derivative(node: Node) -> bool:
    """Whether a step is one of a derivative that the loss takes, by `jax.grad`."""
    return any("jvp(" in str(eqn.source_info.name_stack) for eqn in node.lines)


def _overflow(frame: Frame, node: Node) -> _Why:
    dtype = frame.graph.avals[node.outputs[0]].dtype
    if not frame.graph.inexact(node.outputs[0]):
        return _Why("other", f"`{node.name}` makes it of finite numbers.")
    largest = float(_finfo(dtype).max)
    return _Why(
        "overflow",
        f"overflow in {dtype}: the result of `{node.name}` is beyond {largest:.3g}.",
    )


def _finfo(dtype: Any) -> Any:
    return jnp.finfo(dtype)  # type: ignore[no-untyped-call]


def _callers_of(frame: Frame) -> Iterator[str]:
    """The custom rules whose forward part a frame is in."""
    while frame.outer is not None:
        if frame.outer.kind == "forward":
            yield operation_of(frame.outer.frame.node(frame.outer.number)).strip("_")
        frame = frame.outer.frame


def _backward(frame: Frame, number: int, entry: Entry) -> _Why:
    """Why the backward pass of a step makes a number that isn't finite."""
    outer = frame.outer
    assert outer is not None
    where, place = outer.frame, outer.number
    step, name = where.node(place), operation_of(where.node(place))
    if step.custom and not in_library(rule_place(step.eqn).file):
        itself = _forward(frame, number, entry.at).reason
        return _Why("custom rule", f"the rule of `{name}` itself: {itself}")
    if step.name in _EIGEN:
        return _Why(
            "equal eigenvalues",
            f"two {'singular ' if step.name == 'svd' else 'eigen'}values of `{name}` "
            "are equal, and the slope of their vectors divides by their difference.",
        )
    if step.name in ("cholesky", *_MATRICES) or name.strip("_") in _MATRICES:
        return _Why("singular matrix", f"`{name}` of a matrix that is singular.")
    numbers = _operands_at(where, place, entry.at)
    x = numbers[0] if numbers else None
    y = numbers[1] if len(numbers) > 1 else None
    kept = ""
    if _arriving(frame, entry.at) == 0:
        zero = " The gradient that arrives is 0, and 0 times infinity is NaN."
        kept = _dropped_by(where, place, entry.at) or zero
    if step.name == "sqrt" and x == 0 and is_norm(where, step.operands[0]):
        return _Why(
            "norm at zero",
            f"a norm has no slope at 0: that of the square root is infinite.{kept}",
        )
    if step.name in ("log", "log1p"):
        reason = f"the slope of `{name}` at {_num(x)} is infinite.{kept}"
        return _Why("log of zero", reason)
    if step.name in ("div", "rsqrt", "integer_pow", "atan2"):
        divisor = y if step.name in ("div", "atan2") else x
        if divisor == 0 or step.name == "atan2":
            reason = f"the slope of `{name}` at {_num(divisor)} divides by 0.{kept}"
            root = step.name == "div" and is_root(where, step.operands[1])
            return _Why("division by zero", reason, "root" if root else "")
    if step.name in _SLOPED and not (step.name == "pow" and x != 0):
        reason = f"`{_SLOPED[step.name]}` at {_num(x)} has an infinite slope.{kept}"
        return _Why("infinite slope", reason)
    why = _forward(frame, number, entry.at)
    reason = f"in the backward pass of `{name}`, {why.reason}{kept}"
    return _Why(why.kind, reason, why.repair)


def _num(x: float | None) -> str:
    return "0" if x is None else f"{x:g}"


def _arriving(frame: Frame, index: tuple[int, ...]) -> float | None:
    """The cotangent that arrives at a step, at an entry of it."""
    outer = frame.outer
    assert outer is not None
    count = len(outer.frame.node(outer.number).operands)
    for value in frame.values[count : frame.graph.inputs]:
        if len(np.shape(value)) == len(index) and not jnp.iscomplexobj(value):
            inside = _within(index, np.shape(value))
            return float(pick(value, index)) if inside else None
    return None


def _dropped_by(frame: Frame, number: int, index: tuple[int, ...]) -> str:
    """Says which `where` drops a step's value at an entry, if one does."""
    reached = set(frame.node(number).outputs)
    for later in range(number + 1, len(frame.graph.nodes)):
        node = frame.node(later)
        used = [place for place, v in enumerate(node.operands) if v in reached]
        if not used:
            continue
        if node.name == "select_n" and used[0]:
            which = frame.values[node.operands[0]]
            shape = np.shape(which)
            here = index if len(shape) == len(index) else (0,) * len(shape)
            if _within(here, shape) and int(pick(which, here)) + 1 not in used:
                line, own = source_of(*node.lines), source_of(*frame.node(number).lines)
                where = "" if line == own else f" in {line}"
                return (
                    f" `where`{where} drops this value, but not its gradient: 0 times "
                    "infinity is NaN."
                )
        reached |= set(node.outputs)
    return ""
