"""Where a gradient loses its digits: its equations as they are, and in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.leaves import on_host
from jaxgrad.checking.problem import Problem
from jaxgrad.compiling import Program
from jaxgrad.equations import (
    Place,
    Value,
    Walk,
    inlined,
    literal,
    source_of,
    step_of,
    still,
    wider,
)
from jaxgrad.placing import numbers_of


def where_digits_go(problem: Problem) -> tuple[str, Place] | None:
    """The operation that adds most to the relative error, and its source line."""
    found: list[tuple[str, Place]] = []
    closed = problem.gradient

    def run(values: list[Any], fixed: list[Any], consts: Any) -> Any:
        one = jnp.ones((), problem.loss.out_avals[0].dtype)
        natively = [*values, *fixed, one]
        moving = [Value(wider(x), wider(x), moves=True) for x in values]
        seed = Value(wider(one), wider(one), moves=True)
        widely = [*moving, *map(still, fixed), seed]
        equations = jax.extend.core.ClosedJaxpr(closed.jaxpr, consts)
        errors = []
        for eqn, callers, before, after in _errors(equations, natively, widely, (), []):
            operation = f"`{eqn.primitive.name}` in {eqn.outvars[0].aval.dtype}"
            found.append((operation, source_of(eqn, *callers)))
            errors.append(jnp.stack([before, after]))
        return jnp.stack(errors) if errors else jnp.zeros((0, 2))

    with jax.enable_x64(True):
        operands = on_host((problem.values, problem.fixed, closed.consts))
        errors = numbers_of(Program(run, problem.size, *operands)(*operands))
    if not len(errors):
        return None
    before, after = np.nan_to_num(errors.T, nan=0.0, posinf=0.0)
    return found[int(np.argmax(after - before))]


def _errors(
    closed: Any,
    natively: Sequence[Any],
    widely: Sequence[Value],
    callers: tuple[Any, ...],
    outputs: list[tuple[Any, Value]],
) -> Iterator[tuple[Any, tuple[Any, ...], Any, Any]]:
    """Per equation: the relative errors of its inputs (the largest) and its outputs.

    `outputs` gets what the jaxpr gives, natively and in float64.
    """
    pairs = zip(natively, widely, strict=True)
    environment: dict[Any, tuple[Any, Value]] = dict(
        zip(closed.jaxpr.invars, pairs, strict=True)
    )
    for variable, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        environment[variable] = const, still(const)

    def read(atom: Any) -> tuple[Any, Value]:
        if isinstance(atom, jax.extend.core.Literal):
            return literal(atom), still(literal(atom))
        return environment[atom]

    for eqn in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        native, wide = [x for x, _ in inputs], [x for _, x in inputs]
        body = inlined(eqn)
        out: list[tuple[Any, Value]] = []
        if body is not None:
            yield from _errors(body, native, wide, (eqn, *callers), out)
        else:
            as_it_is = step_of(eqn, [still(x) for x in native], Walk(wide=False), {})
            wider_ = step_of(eqn, wide, Walk(), {})
            out = [(a.now, b) for a, b in zip(as_it_is, wider_, strict=True)]
            before = [_error(a, b) for a, b in inputs]
            after = [_error(a, b) for a, b in out]
            if any(value.moves for value in wide) and after:
                yield eqn, callers, _most(before), _most(after)
        environment.update(zip(eqn.outvars, out, strict=True))
    outputs[:] = [read(atom) for atom in closed.jaxpr.outvars]


def _error(native: Any, wide: Value) -> Any:
    """Relative, in the 2-norm."""
    exact = jnp.asarray(wide.now)
    if not (wide.moves and jnp.issubdtype(exact.dtype, jnp.floating)):
        return jnp.zeros(())
    gap = jnp.linalg.norm((jnp.asarray(native).astype(exact.dtype) - exact).ravel())
    return gap / jnp.maximum(jnp.linalg.norm(exact.ravel()), 1e-300)


def _most(errors: Sequence[Any]) -> Any:
    return jnp.max(jnp.stack([*errors, jnp.zeros(())]))
