"""What a variable of a jaxpr holds, at two points, and how the two differ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_EPS = float(np.finfo(np.float64).eps)

_SUMS = (
    "add",
    "add_any",
    "sub",
    "neg",
    "reduce_sum",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "transpose",
    "convert_element_type",
    "slice",
    "concatenate",
    "copy",
    "gather",
    "dynamic_slice",
    "select_n",
    "rev",
    "pad",
    "cumsum",
)


@dataclass(frozen=True)
class Value:
    """What a variable of the jaxpr holds.

    Attributes:
      now: its value at the displaced point.
      held: its value at the point itself, if both are kept; else `now`.
      moves: whether it depends on the parameters.
      terms: makes `now - held`, and the size of what was subtracted, from those of what
        it's a sum of, if it is one.
    """

    now: Any
    held: Any
    moves: bool
    terms: Callable[[], Change] | None = None

    def astype(self, dtype: Any) -> Value:
        """The value in another dtype."""
        now, held = (lax.convert_element_type(x, dtype) for x in (self.now, self.held))
        return Value(now, held, self.moves)

    def change(self) -> Change:
        """`now - held`, taken before the last sums and products.

        So the other terms of a sum don't take its digits away.
        """
        if self.terms:
            return self.terms()
        by, size = self.now - self.held, jnp.abs(self.held)
        # Two compiled copies of an unmoved number may differ in their last bits.
        moved = jnp.where(jnp.abs(by) > 4 * _EPS * size, size, 0)
        return Change(by, moved, size)


class Change(NamedTuple):
    """A difference of two values of a variable.

    Attributes:
      by: the difference.
      moved: the size of the numbers that it was taken of, where they differ.
      size: their size, also where they don't.
    """

    by: Any
    moved: Any
    size: Any


# Across the border of a loop or a branch the terms are forgotten.
jax.tree_util.register_pytree_node(
    Value,
    lambda value: ((value.now, value.held), value.moves),
    lambda moves, both: Value(*both, moves),
)


def bind(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Applies an equation's primitive, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    functions: Sequence[Any] = ()
    if isinstance(params, tuple):  # before jax 0.10
        functions, params = params
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def literal(atom: Any) -> np.ndarray:
    """A literal's number, in its own dtype."""
    return np.asarray(atom.val, atom.aval.dtype)


def still(value: Any) -> Value:
    """A value that doesn't depend on the parameters."""
    return Value(value, value, moves=False)


def wider(array: Any) -> Any:
    """An array of floats in float64, of complex numbers in complex128."""
    wide = wide_dtype(array.dtype)
    return array if wide == array.dtype else lax.convert_element_type(array, wide)


def wide_dtype(dtype: Any) -> Any:
    """float64 for a dtype of floats, complex128 for one of complex numbers."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return dtype


def terms_of(
    eqn: Any, inputs: list[Value], changed: Mapping[str, Any], out: Value
) -> Callable[[], Change] | None:
    """The change of an output from those of the inputs, where a formula has it."""
    name = eqn.primitive.name
    floats = [jnp.issubdtype(v.now.dtype, jnp.inexact) for v in inputs]
    if any(v.moves and not real for v, real in zip(inputs, floats, strict=True)):
        return None

    def apply(*operands: Any) -> Any:
        return bind(eqn, operands, **changed)[0]

    def change_of(value: Value) -> Change:
        if value.moves:
            return value.change()
        return Change(*3 * (jnp.zeros_like(value.now),))

    @functools.cache
    def added() -> Change:
        # Indices and masks stay what they are; other numbers that rest add nothing.
        parts = [
            change_of(value) if real else Change(*3 * (value.now,))
            for value, real in zip(inputs, floats, strict=True)
        ]
        by, *sizes = (apply(*column) for column in zip(*parts, strict=True))
        if name == "sub":
            sizes = [a + b for a, b in list(zip(*parts, strict=True))[1:]]
        moved, size = map(jnp.abs, sizes)
        if all(value.moves for value in inputs) and len(inputs) == 2:
            # What all but cancels, such as a maximum and its own entry, has the same
            # roundings in both, at both points.
            near = jnp.abs(out.held) < 1e-3 * size
            by = jnp.where(near, out.now - out.held, by)
        return Change(by, moved, size)

    @functools.cache
    def multiplied() -> Change:
        (a, b), (x, y) = map(change_of, inputs), (value.held for value in inputs)
        by = apply(a.by, y) + apply(x, b.by) + apply(a.by, b.by)
        x, y = jnp.abs(x), jnp.abs(y)
        return Change(
            by,
            apply(a.moved, y) + apply(x, b.moved),
            apply(a.size, y) + apply(x, b.size),
        )

    @functools.cache
    def divided() -> Change:
        change, by = change_of(inputs[0]), inputs[1].now
        return Change(change.by / by, *(x / jnp.abs(by) for x in change[1:]))

    @functools.cache
    def squared() -> Change:
        a, x = change_of(inputs[0]), inputs[0].held
        return Change(a.by * (2 * x + a.by), *(2 * jnp.abs(x) * s for s in a[1:]))

    @functools.cache
    def logged() -> Change:
        a, x = change_of(inputs[0]), inputs[0].held + (name == "log1p")
        return Change(jnp.log1p(a.by / x), *(s / jnp.abs(x) for s in a[1:]))

    if name in _SUMS:
        return added
    if name in ("log", "log1p"):
        return logged
    if name in ("mul", "dot_general"):
        return multiplied
    if name == "div" and not inputs[1].moves:
        return divided
    if name == "square" or (name == "integer_pow" and eqn.params["y"] == 2):
        return squared
    return None
