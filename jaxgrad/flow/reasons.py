"""Why a step made a number that isn't finite, in words, and what to write instead."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxgrad.equations import Node, Place, in_library, rule_place, source_of
from jaxgrad.flow.frames import Frame, opens
from jaxgrad.flow.origins import Entry, Found
from jaxgrad.flow.places import Spot, operation_of, spot_of

NonfiniteKind = Literal[
    "infinite slope",
    "norm at zero",
    "log of zero",
    "division by zero",
    "zero times infinity",
    "infinity minus infinity",
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
        return (
            f"The first number that isn't finite is made in the {self.phase} pass of "
            f"`{self.operation}` in {where}{inside}, at {list(self.index)}: "
            f"{self.reason}"
        )


def explain(found: Found, *, harmless: bool) -> Origin:
    """Says in words what was found."""
    frame, number, entry = found.entry.frame, found.node, found.entry
    if found.born and _is_softmax(*found.born) and np.isneginf(entry.value):
        entry, number = found.born
        kind: NonfiniteKind = "empty softmax"
        reason = (
            "every entry that softmax is taken over is -inf, so that its maximum is "
            "-inf too, and -inf - (-inf) is NaN: the mask leaves nothing."
        )
        return _origin(entry.frame, number, "forward", kind, reason, entry, harmless)
    if found.given:
        return _given(found, harmless)
    outer = frame.outer
    if outer is None or outer.kind != "backward":
        kind, reason = _forward(frame, number, entry.at)
        return _origin(frame, number, "forward", kind, reason, entry, harmless)
    step = outer.frame.node(outer.number)
    inner = frame.node(number)
    again = inner.name == step.name and all(
        v < len(step.operands) or v in frame.graph.constants for v in inner.operands
    )
    if again and not step.custom:
        # The step's own value, which its backward pass uses.
        kind, reason = _forward(frame, number, entry.at)
        return _origin(frame, number, "forward", kind, reason, entry, harmless)
    kind, reason = _backward(frame, number, entry)
    return _origin(frame, number, "backward", kind, reason, entry, harmless)


def _origin(
    frame: Frame,
    number: int,
    phase: Literal["forward", "backward"],
    kind: NonfiniteKind,
    reason: str,
    entry: Entry,
    harmless: bool,
    name: str = "",
) -> Origin:
    spot = spot_of(frame, number)
    return Origin(
        **vars(spot),
        phase=phase,
        kind=kind,
        reason=reason,
        repair=repair_of(kind, spot, _operands_at(frame, number, entry.at)),
        index=entry.at,
        name=name,
        harmless=harmless,
    )


def _given(found: Found, harmless: bool) -> Origin:
    entry = found.entry
    name = entry.frame.name_of(entry.variable)
    users = entry.frame.graph.users.get(entry.variable, (found.node,))
    where = f" at {list(entry.at)}" if entry.at else ""
    reason = f"`{name}` is {entry.value}{where} already"
    if found.born:
        nan, number = found.born
        born = nan.frame.node(number)
        line = source_of(*born.lines)
        reason += f", and `{operation_of(born)}` in {line} makes NaN of it"
    return _origin(
        entry.frame, users[0], "forward", "non-finite input", f"{reason}.", entry,
        harmless, name,
    )  # fmt: skip


def _is_softmax(entry: Entry, number: int) -> bool:
    """Whether a node subtracts a maximum, as softmax and log-softmax do."""
    node = entry.frame.node(number)
    return node.name == "sub" and "reduce_max" in _behind(entry.frame, node.operands[1])


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
        if not np.issubdtype(np.asarray(x).dtype, np.complexfloating) and (
            shape == () or len(shape) == len(index)
        ):
            numbers.append(float(np.asarray(x[index] if shape else x)))
        else:
            numbers.append(None)
    return numbers


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
    "cholesky": "of a matrix that isn't positive definite",
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


def _forward(
    frame: Frame, number: int, index: tuple[int, ...]
) -> tuple[NonfiniteKind, str]:
    """Why a step's value isn't finite, though its inputs are."""
    node = frame.node(number)
    name, numbers = node.name, _operands_at(frame, number, index)
    x = numbers[0] if numbers else None
    y = numbers[1] if len(numbers) > 1 else None
    for matrix in (name, *_callers_of(frame)):
        if matrix in _MATRICES:
            return "singular matrix", f"`{matrix}` of a matrix that is singular."
    if name in ("log", "log1p") and x == (0 if name == "log" else -1):
        if "reduce_sum" in _behind(frame, node.operands[0]) and _all_masked(
            frame, node.operands[0]
        ):
            return (
                "empty softmax",
                "every entry that logsumexp is taken over is -inf, so that it is the "
                "log of 0: the mask leaves nothing.",
            )
        return "log of zero", f"`{name}` at {x:g} is -inf."
    if name == "div" and y == 0:
        if _all_masked(frame, node.operands[1]):
            return (
                "empty softmax",
                "the sum that softmax divides by is 0: the mask leaves nothing.",
            )
        what = "NaN" if x == 0 else "infinite"
        over = "0 / 0" if x == 0 else f"{x:.3g} / 0"
        return "division by zero", f"{over} is {what}."
    if name == "rem" and y == 0:
        return "division by zero", "a remainder of a division by 0 is NaN."
    if name == "rsqrt" and x == 0:
        return "division by zero", "`rsqrt` at 0 is 1 / 0."
    if name == "integer_pow" and x == 0:
        power = node.eqn.params["y"]
        return "division by zero", f"0 to the power {power} is 1 / 0."
    if name == "pow" and x == 0:
        return "division by zero", f"0 to the power {y:.3g} is 1 / 0."
    if name == "pow" and x is not None and x > 0:
        return _overflow(frame, node)
    if name in _DOMAINS:
        at = f", here {x:.6g}" if x is not None else ""
        return "domain", f"`{name}` {_DOMAINS[name]}{at}."
    if name in ("gather", "dynamic_slice"):
        return (
            "out of range",
            "an index is outside of the array, and what is read there is NaN.",
        )
    if name in _EIGEN:
        return "other", f"`{name}` didn't converge."
    if opens(node):
        return "other", f"`{operation_of(node)}` makes it of finite numbers."
    return _overflow(frame, node)


def _overflow(frame: Frame, node: Node) -> tuple[NonfiniteKind, str]:
    dtype = frame.graph.avals[node.outputs[0]].dtype
    if not frame.graph.inexact(node.outputs[0]):
        return "other", f"`{node.name}` makes it of finite numbers."
    largest = float(_finfo(dtype).max)
    return (
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


def _all_masked(frame: Frame, variable: int) -> bool:
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


def _backward(frame: Frame, number: int, entry: Entry) -> tuple[NonfiniteKind, str]:
    """Why the backward pass of a step makes a number that isn't finite."""
    outer = frame.outer
    assert outer is not None
    where, place = outer.frame, outer.number
    step = where.node(place)
    if step.custom and not in_library(rule_place(step.eqn).file):
        _, why = _forward(frame, number, entry.at)
        return "custom rule", f"the rule of `{operation_of(step)}` itself: {why}"
    numbers = _operands_at(where, place, entry.at)
    x = numbers[0] if numbers else None
    y = numbers[1] if len(numbers) > 1 else None
    arriving = _arriving(frame, entry.at)
    kept = _kept_alive(where, place) if arriving == 0 else ""
    name = operation_of(step)
    if step.name in _EIGEN:
        return (
            "equal eigenvalues",
            f"two {'singular ' if step.name == 'svd' else 'eigen'}values of `{name}` "
            "are equal, and the slope of their vectors divides by their difference.",
        )
    if step.name in ("cholesky", *_MATRICES) or name.strip("_") in _MATRICES:
        return "singular matrix", f"`{name}` of a matrix that is singular."
    if step.name == "sqrt" and x == 0 and "reduce_sum" in _behind(
        where, step.operands[0]
    ):  # fmt: skip
        return (
            "norm at zero",
            f"a norm has no slope at 0: that of the square root is infinite.{kept}",
        )
    if step.name in ("log", "log1p"):
        return "log of zero", f"the slope of `{name}` at {_num(x)} is infinite.{kept}"
    if step.name in ("div", "rsqrt", "integer_pow", "atan2"):
        divisor = y if step.name in ("div", "atan2") else x
        if divisor == 0 or step.name == "atan2":
            return (
                "division by zero",
                f"the slope of `{name}` at {_num(divisor)} divides by 0.{kept}",
            )
    if step.name in _SLOPED and not (step.name == "pow" and x != 0):
        return (
            "infinite slope",
            f"`{_SLOPED[step.name]}` at {_num(x)} has an infinite slope.{kept}",
        )
    kind, why = _forward(frame, number, entry.at)
    return kind, f"in the backward pass of `{name}`, {why}{kept}"


def _num(x: float | None) -> str:
    return "0" if x is None else f"{x:g}"


def _arriving(frame: Frame, index: tuple[int, ...]) -> float | None:
    """The cotangent that arrives at a step, at an entry of it."""
    outer = frame.outer
    assert outer is not None
    count = len(outer.frame.node(outer.number).operands)
    for value in frame.values[count : frame.graph.inputs]:
        if len(np.shape(value)) == len(index) and np.isrealobj(np.asarray(value)):
            try:
                return float(value[index])
            except IndexError:
                return None
    return None


def _kept_alive(frame: Frame, number: int) -> str:
    """Says which `where` drops a step's value, and not its gradient."""
    reached = set(frame.node(number).outputs)
    for later in range(number + 1, len(frame.graph.nodes)):
        node = frame.node(later)
        if not reached & set(node.operands):
            continue
        if node.name == "select_n":
            line, own = source_of(*node.lines), source_of(*frame.node(number).lines)
            where = "" if line == own else f" in {line}"
            return (
                f" `where`{where} drops this value, but not its gradient: 0 times "
                "infinity is NaN."
            )
        reached |= set(node.outputs)
    return " The gradient that arrives is 0, and 0 times infinity is NaN."


_USE_WHERE = (
    "Make the input safe before the operation, not only the result after it:\n{code}"
)


def repair_of(kind: NonfiniteKind, spot: Spot, numbers: list[float | None]) -> str:
    """What to write instead of the line."""
    call, condition = _call_on(spot)
    safe = {
        "log": "log", "sqrt": "sqrt", "div": "", "rsqrt": "rsqrt", "pow": "power",
        "log1p": "log1p", "acos": "arccos", "asin": "arcsin", "atanh": "arctanh",
    }  # fmt: skip
    if kind in ("infinite slope", "log of zero", "division by zero", "domain"):
        if spot.operation in safe and call is not None:
            function, argument = call
            test = condition or f"{argument} > 0"
            if spot.operation in ("div",):
                test = condition or f"{argument} != 0"
            code = f"    safe = jnp.where({test}, {argument}, 1.0)\n"
            code += f"    jnp.where({test}, {function.format('safe')}, 0.0)"
            return _USE_WHERE.format(code=code)
        return _USE_WHERE.format(
            code="    safe = jnp.where(ok, x, 1.0)\n    jnp.where(ok, f(safe), 0.0)"
        )
    return _REPAIRS.get(kind, "")


_REPAIRS: dict[str, str] = {
    "norm at zero": (
        "Add a small number under the root, `jnp.sqrt(jnp.sum(x**2) + 1e-12)`, or make "
        "the input safe:\n    zero = jnp.all(x == 0)\n"
        "    jnp.where(zero, 0.0, jnp.linalg.norm(jnp.where(zero, 1.0, x)))"
    ),
    "overflow": (
        "Compute it in a wider dtype (`x.astype(jnp.float32)`), scale the numbers "
        "before, or use the stable form: `jax.nn.logsumexp`, `jax.nn.log_softmax`, "
        "`jax.nn.softplus`, `optax.sigmoid_binary_cross_entropy`."
    ),
    "equal eigenvalues": (
        "Use what has a slope there: the eigenvalues alone, or a function of the whole "
        "matrix. Else make them differ: add a small diagonal, such as "
        "`jnp.diag(1e-6 * jnp.arange(n))`."
    ),
    "singular matrix": (
        "Add a small multiple of the identity, `a + 1e-6 * jnp.eye(n)`, or use "
        "`jnp.linalg.lstsq`."
    ),
    "empty softmax": (
        "Let the mask leave something: mask with a large negative number instead of "
        "-inf, `jnp.where(mask, scores, -1e9)`, or give the empty rows their own "
        "value:\n    some = mask.any(-1, keepdims=True)\n"
        "    p = jax.nn.softmax(jnp.where(mask | ~some, scores, -jnp.inf))\n"
        "    p = jnp.where(some, p, 0.0)"
    ),
    "out of range": (
        "Keep the index inside of the array, or say what to read outside of it: "
        '`x.at[index].get(mode="fill", fill_value=0)`.'
    ),
    "non-finite input": (
        "Mend it before it gets here: `jnp.nan_to_num`, or a mask that drops the row "
        "before anything is computed of it."
    ),
    "custom rule": "Mend the rule: make its input safe before it is divided by.",
    "zero times infinity": _USE_WHERE.format(code="    safe = jnp.where(ok, x, 1.0)"),
    "infinity minus infinity": "Keep both numbers finite before they are subtracted.",
}


_FUNCTIONS = {
    "sqrt": ("sqrt",),
    "log": ("log", "log2", "log10"),
    "log1p": ("log1p",),
    "rsqrt": ("rsqrt",),
    "pow": ("power", "pow", "float_power"),
    "acos": ("arccos", "acos"),
    "asin": ("arcsin", "asin"),
    "atanh": ("arctanh", "atanh"),
}


def _call_on(spot: Spot) -> tuple[tuple[str, str] | None, str]:
    """The operation as it's written on a line, its argument, and the `where`'s test."""
    text = spot.text.removeprefix("return ").rstrip(":,")
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None, ""
    found: tuple[str, str] | None = None
    test = ""
    for item in ast.walk(tree):
        if isinstance(item, ast.Call):
            name = ast.unparse(item.func).rpartition(".")[2]
            if name == "where" and len(item.args) == 3:
                test = ast.unparse(item.args[0])
            if name in _FUNCTIONS.get(spot.operation, ()) and item.args:
                first, *rest = map(ast.unparse, item.args)
                more = "".join(f", {text}" for text in rest)
                found = f"{ast.unparse(item.func)}({{}}{more})", first
        if isinstance(item, ast.BinOp):
            left, right = ast.unparse(item.left), ast.unparse(item.right)
            if spot.operation == "div" and isinstance(item.op, ast.Div):
                found = f"{left.replace('{', '{{').replace('}', '}}')} / {{}}", right
            if spot.operation == "pow" and isinstance(item.op, ast.Pow):
                found = f"{{}} ** {right}", left
    return found, test
