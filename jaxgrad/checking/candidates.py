"""Gradients that may be right where the claimed one is not, and the parts of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.leaves import Leaf, as_numpy, leaf_of, on_host
from jaxgrad.checking.problem import Problem
from jaxgrad.compiling import Program
from jaxgrad.equations import Taps, Value, Walk, bind, evaluate, literal, still, wider


def without_rules(problem: Problem, pulls: Taps, hold: int) -> list[Leaf] | None:
    """The gradient by differentiating the forward part of each custom rule.

    `hold` says, as in `Walk`, where a `stop_gradient` is one. `None` where JAX can't: a
    while loop has no reverse mode.
    """

    def value(values: list[Any], fixed: Any, consts: Any, pulls: Any) -> Any:
        return _inlined(problem, values, fixed, consts, pulls, hold)

    def gradient(values: list[Any], *rest: Any) -> list[Any]:
        return problem.laid(jax.grad(value)(values, *rest))

    try:
        found = _run(problem, gradient, pulls)
    except Exception:  # of whatever kind: JAX has one of its own for explicit axes
        return None
    return [leaf_of(x, v) for x, v in zip(found, problem.values, strict=True)]


def _inlined(
    problem: Problem, values: Any, fixed: Any, consts: Any, pulls: Any, hold: int
) -> Any:
    walk = Walk(pulls=pulls, hold=hold)
    closed = jax.extend.core.ClosedJaxpr(problem.loss.jaxpr, consts)
    moving = [Value(x, x, moves=True) for x in values]
    return evaluate(closed, [*moving, *map(still, fixed)], walk)[0].now


def _run(problem: Problem, function: Callable[..., Any], pulls: Taps) -> list[Any]:
    with jax.enable_x64(True):
        values = [wider(x) for x in problem.values]
        operands = on_host((values, problem.fixed, problem.loss.consts, pulls))
        return list(Program(function, problem.size, *operands)(*operands))


# So many parts of a leaf's gradient are told apart, and so many numbers made for them.
_PARTS = 64
_NUMBERS = 4_000_000


def parts_of(
    problem: Problem, pulls: Taps
) -> Callable[[int], list[tuple[str, np.ndarray]]]:
    """The gradients of the terms that a loss adds up, and of the rows of each term.

    Those of one leaf at a time come to the host.
    """
    sizes = sum(x.size for x in problem.values)
    labels: list[str] = []

    def terms(values: list[Any], fixed: Any, consts: Any, pulls: Any) -> Any:
        closed = jax.make_jaxpr(
            lambda v: _inlined(problem, v, fixed, consts, pulls, 1)
        )(values)
        labels[:], parts = _terms(closed, values)
        return jnp.stack(parts)

    def gradients(*operands: Any) -> Any:
        return jax.jacrev(terms)(*operands)

    stacked: list[Any] = []
    if _PARTS * sizes <= _NUMBERS:
        with contextlib.suppress(Exception):
            stacked = _run(problem, gradients, pulls)

    def parts(number: int) -> list[tuple[str, np.ndarray]]:
        if not stacked:
            return []
        return list(zip(labels, as_numpy(stacked[number]), strict=True))

    return parts


_LINEAR = (
    "neg",
    "convert_element_type",
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "transpose",
    "reduce_sum",
    "copy",
)


def _terms(closed: Any, values: list[Any]) -> tuple[list[str], list[Any]]:
    """What a scalar's last additions add up, as scalars with labels."""
    environment = dict(zip(closed.jaxpr.invars, values, strict=True))
    environment |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    makers: dict[Any, Any] = {}
    moving = set(closed.jaxpr.invars)

    def read(atom: Any) -> Any:
        if isinstance(atom, jax.extend.core.Literal):
            return literal(atom)
        return environment[atom]

    def moves(atom: Any) -> bool:
        return not isinstance(atom, jax.extend.core.Literal) and atom in moving

    for eqn in closed.jaxpr.eqns:
        outputs = bind(eqn, [read(atom) for atom in eqn.invars])
        environment.update(zip(eqn.outvars, outputs, strict=True))
        makers |= dict.fromkeys(eqn.outvars, eqn)
        if any(map(moves, eqn.invars)):
            moving |= set(eqn.outvars)

    def expand(atom: Any) -> list[Any]:
        """Arrays of the atom's shape that add up to it."""
        eqn = None if isinstance(atom, jax.extend.core.Literal) else makers.get(atom)
        if eqn is None or not moves(atom):
            return [read(atom)]
        name, inputs = eqn.primitive.name, eqn.invars
        if name in ("add", "add_any"):
            return [*expand(inputs[0]), *expand(inputs[1])]
        if name == "sub":
            return [*expand(inputs[0]), *(-part for part in expand(inputs[1]))]
        first = [moves(atom) for atom in inputs] == [True, *[False] * (len(inputs) - 1)]
        if name in _LINEAR or (name in ("mul", "div") and first):
            if name == "reduce_sum" and 0 in eqn.params["axes"]:
                rows = [_rows(part) for part in expand(inputs[0])]
                if sum(map(len, rows)) <= _PARTS:
                    parts = [row for some in rows for row in some]
                    return [bind(eqn, [part])[0] for part in parts]
            rest = [read(atom) for atom in inputs[1:]]
            return [bind(eqn, [part, *rest])[0] for part in expand(inputs[0])]
        if name == "mul" and moves(inputs[1]) and not moves(inputs[0]):
            return [read(inputs[0]) * part for part in expand(inputs[1])]
        return [read(atom)]

    parts = expand(closed.jaxpr.outvars[0])[:_PARTS]
    return [f"part {n} of {len(parts)}" for n in range(len(parts))], parts


def _rows(array: Any) -> list[Any]:
    count = len(array)
    chunks = np.array_split(np.arange(count), min(count, _PARTS // 2))
    return [jnp.zeros_like(array).at[chunk].set(array[chunk]) for chunk in chunks]
