"""What is checked: the equations of a function and of its gradient, and the point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.leaves import (
    Leaf,
    is_spread,
    leaf_of,
    made_of_leaf,
    on_host,
    operand,
    shared,
    spread,
    spread_like,
)
from jaxgrad.checking.sums import scaled
from jaxgrad.compiling import Program, shaped
from jaxgrad.equations import (
    Path,
    Place,
    Taps,
    Value,
    Walk,
    count_numbers,
    equations,
    evaluate,
    function_place,
    rule_place,
    rule_sites,
    still,
    taps_of,
    wider,
)
from jaxgrad.placing import keep, layouts_of, writes_one
from jaxgrad.pytrees import Loss, function_name, is_array, loss_and_aux


@dataclass(frozen=True)
class Problem:
    """A scalar function of some arrays, as equations.

    Attributes:
      names: the leaves' paths.
      values: the leaves, which are differentiated.
      fixed: the other arrays that the function takes.
      loss: its equations, from `[*values, *fixed]` to a scalar.
      gradient: those of its reverse mode, from `[*values, *fixed, cotangent]` to the
        value and the gradients; `None` where it has none.
      forward: those of its forward mode, from `[*values, *fixed, *tangents]`.
      taps: zeros for the inputs and outputs of trusted rules.
      pulls: the equations of the cotangents of those, from `[*values, *fixed, *taps]`;
        `None` where no rule is trusted.
      trusted: says of a custom rule's place whether it's meant to differ.
      retrace: makes `loss` once more, from the function itself.
    """

    names: tuple[str, ...]
    values: list[Any]
    fixed: list[Any]
    loss: Any
    gradient: Any
    forward: Any
    taps: Taps
    pulls: Any
    trusted: Callable[[Place], bool]
    retrace: Callable[[], Any]

    def laid(self, gradient: Sequence[Any]) -> list[Any]:
        """In a program: a gradient, spread over devices as its leaves are."""
        layouts = layouts_of(self.values)
        equations = self.loss if self.gradient is None else self.gradient
        apart = any(layouts) and writes_one(equations)
        return keep(list(gradient), layouts, apart)  # type: ignore[no-any-return]

    @cached_property
    def size(self) -> int:
        """How many numbers one evaluation of the loss makes, about."""
        return count_numbers(self.loss.jaxpr.eqns)


def scalar_function(loss: Loss, has_aux: bool, seed: int) -> Callable[..., Any]:
    """The loss as a function to a scalar: arrays are projected on fixed random ones."""

    def scalar(*operands: Any) -> Any:
        output = loss(*operands)
        if has_aux:
            if not (isinstance(output, tuple) and len(output) == 2):
                loss_and_aux(loss, output, has_aux)
            output = output[0]
        leaves = jax.tree.leaves(output)
        arrays = [x for x in leaves if is_array(x)]
        if not arrays or (len(leaves) == 1 and jnp.ndim(arrays[0]) == 0):
            return loss_and_aux(loss, output, has_aux=False)[0]
        inexact = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]
        if not inexact:
            raise TypeError(
                f"{function_name(loss)} returned no floating array: integers and "
                "booleans have no gradient."
            )
        rng = np.random.default_rng(seed)
        return sum(project(x, rng) for x in inexact)

    return scalar


def project(array: Any, rng: np.random.Generator) -> Any:
    """The sum of an array's entries times fixed random numbers, none of them small."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return project(array.real, rng) + project(array.imag, rng)
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.sum(wide * jnp.asarray(spread(rng, array.shape), wide.dtype))


def trust_of(trust: Sequence[Callable[..., Any]], loss: Any) -> Callable[[Place], bool]:
    """Says of a custom rule's place whether it's one of the trusted functions.

    Raises:
      ValueError: the loss has no custom rule of a trusted function.
    """
    places = {function_place(function) for function in trust}
    found = {rule_place(eqn) for eqn, _ in rule_sites(loss, nested=True).values()}
    for place in places - found:
        others = ", ".join(sorted(str(p) for p in found if p.line)[:4]) or "none"
        raise ValueError(
            f"trust= names {place}, and the loss has no custom rule of it. Give the "
            "function that `jax.custom_vjp` or `jax.custom_jvp` made. The loss's "
            f"custom rules: {others}."
        )
    return lambda place: place in places


def equations_of(
    names: tuple[str, ...],
    values: list[Any],
    fixed: list[Any],
    function: Callable[[Sequence[Any], Sequence[Any]], Any],
    *,
    trust: Sequence[Callable[..., Any]] = (),
    reverse: bool = True,
) -> Problem:
    """Traces a scalar function of `(values, fixed)`, its gradient and its tangent.

    With `reverse=False` the function needn't have a gradient.
    """

    def trace() -> Any:
        return jax.make_jaxpr(lambda *both: function(*both))(values, fixed)

    loss = trace()
    trusted = trust_of(trust, loss)
    taps = taps_of(loss, trusted) if trust else {}

    def tapped(values: Sequence[Any], fixed: Sequence[Any], taps: Any) -> Any:
        moving = [Value(x, x, moves=True) for x in values]
        walk = Walk(wide=False, keep=True, taps=taps)
        return evaluate(loss, [*moving, *map(still, fixed)], walk)[0].now

    def backward(values: Sequence[Any], fixed: Sequence[Any], cotangent: Any) -> Any:
        # Traced anew, to see if the function is deterministic.
        value, pull = jax.vjp(lambda v: function(v, fixed), values)
        return value, pull(cotangent)

    gradient = pulls = None
    one = np.ones((), loss.out_avals[0].dtype)
    with contextlib.suppress(*(() if reverse else (Exception,))):
        gradient = jax.make_jaxpr(backward)(values, fixed, one)
    if taps:
        pulls = jax.make_jaxpr(jax.grad(tapped, argnums=2))(values, fixed, taps)
    forward = None if trust else _forward_equations(function, loss, values, fixed)
    return Problem(
        names, values, fixed, loss, gradient, forward, taps, pulls, trusted, trace
    )


def _forward_equations(
    function: Callable[..., Any], loss: Any, values: list[Any], fixed: list[Any]
) -> Any:
    names = [eqn.primitive.name for eqn in equations(loss)]
    if any(name.startswith("custom_vjp_call") for name in names):
        return None
    try:
        return jax.make_jaxpr(
            lambda v, f, t: jax.jvp(lambda v: function(v, f), (v,), (t,))[1]
        )(values, fixed, values)
    except (TypeError, ValueError, NotImplementedError):
        return None  # a primitive without a forward rule


@dataclass(frozen=True)
class Gradients:
    """A gradient, leaf by leaf, and what came with it.

    Attributes:
      value: the loss.
      leaves: one array per leaf.
      slopes: the derivative along one direction by forward and by reverse mode.
      pulls: the cotangents of the inputs and outputs of trusted rules.
    """

    value: float
    leaves: list[Leaf]
    slopes: tuple[float, float] | None
    pulls: dict[Path, Any]


class NativeGradient:
    """What `jax.grad` gives, in the function's own dtypes, on its own devices."""

    def __init__(self, problem: Problem) -> None:
        jaxpr, consts = problem.gradient.jaxpr, problem.gradient.consts
        one = np.ones((), problem.loss.out_avals[0].dtype)
        self._values = problem.values
        self._operands = consts, [*problem.values, *problem.fixed, one]

        def run(consts: Any, operands: list[Any]) -> list[Any]:
            value, *leaves = jax.core.eval_jaxpr(jaxpr, consts, *operands)
            return [value, *problem.laid(leaves)]

        self.program = Program(run, problem.size, *self._operands)

    def __call__(self) -> Gradients:
        """The gradient."""
        value, *leaves = self.program(*self._operands)
        # In their own dtype: another copy of a large leaf would be one too many.
        own = [leaf_of(x, v) for x, v in zip(leaves, self._values, strict=True)]
        return Gradients(float(value), own, None, {})


def epsilon(dtype: Any) -> float:
    """The rounding error of a dtype: the gap between 1 and the next number."""
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


class WideGradient:
    """What the rules give in float64: the equations of the gradient, made wider."""

    def __init__(
        self, problem: Problem, seed: int, notes: list[str], point: list[Any] | None
    ) -> None:
        self._problem, self._seed = problem, seed
        count = len(problem.values)
        walk = Walk(notes=notes)

        def run(values: Any, fixed: Any, consts: Any, tangents: Any) -> Any:
            held = [still(x) for x in fixed]

            def wide(equations: Any, consts: Any, rest: Sequence[Any]) -> list[Any]:
                closed = jax.extend.core.ClosedJaxpr(equations.jaxpr, consts)
                before, after = (
                    [Value(x, x, moves=True) for x in v] for v in (values, rest)
                )
                return [
                    wider(v.now)
                    for v in evaluate(closed, [*before, *held, *after], walk)
                ]

            one = jnp.ones((), jnp.float64)
            out, *leaves = wide(problem.gradient, consts[0], [one])
            out = [out, *problem.laid(leaves)]
            pulls = []
            if problem.pulls is not None:
                taps = [wider(x) for x in jax.tree.leaves(problem.taps)]
                pulls = wide(problem.pulls, consts[2], taps)
            if problem.forward is None:
                return out, pulls, None
            # Each leaf's part is made as large as any other's, so that none hides.
            parts = [g * t for g, t in zip(out[1 : 1 + count], tangents, strict=True)]
            sizes = [jnp.sqrt(jnp.sum(part**2)) for part in parts]
            least = 1e-12 * jnp.maximum(jnp.abs(out[0]), 1e-13)  # less is rounding
            sizes = [jnp.where(s > least, s, jnp.inf) for s in sizes]
            reverse = sum(jnp.sum(p) / s for p, s in zip(parts, sizes, strict=True))
            along = [t / s for t, s in zip(tangents, sizes, strict=True)]
            return out, pulls, (wide(problem.forward, consts[1], along)[0], reverse)

        consts = [
            closed.consts if closed is not None else ()
            for closed in (problem.gradient, problem.forward, problem.pulls)
        ]
        with jax.enable_x64(True):
            values = point or [wider(x) for x in problem.values]
            self._operands = on_host((values, problem.fixed, consts))
            shapes = [
                shaped(x.shape, x.dtype, x.sharding if is_spread(x) else None)
                for x in self._operands[0]
            ]
            tangents = shapes if problem.forward is not None else []
            self.program = Program(run, problem.size, *self._operands, tangents)

    def __call__(self, nudge: float = 0.0) -> Gradients:
        """The gradient; with each parameter moved by up to a share of itself."""
        values, *rest = self._operands
        with jax.enable_x64(True):
            if nudge:
                rng = np.random.default_rng(0)
                moves = [operand(spread_like(rng, x), x) for x in values]
                pairs = zip(values, moves, strict=True)
                values = [x * (1 + nudge * move) for x, move in pairs]
            tangents = self._tangents()
            (value, *leaves), pulls, slopes = self.program(values, *rest, tangents)
            pulls = shared(pulls, values)
        pulls = jax.tree.unflatten(jax.tree.structure(self._problem.taps), pulls)
        both = None if slopes is None else (float(slopes[0]), float(slopes[1]))
        own = [leaf_of(x, v) for x, v in zip(leaves, values, strict=True)]
        return Gradients(float(value), own, both, pulls)

    def _tangents(self) -> list[Any]:
        """A direction for forward mode, in proportion to the parameters."""
        if self._problem.forward is None:
            return []
        rng = np.random.default_rng(self._seed)
        tangents = []
        for value in self._operands[0]:
            sizes = _sizes(leaf_of(value, value))
            tangents.append(operand(scaled(spread_like(rng, sizes), sizes), value))
        return tangents


@made_of_leaf
def _sizes(xp: Any, leaf: Leaf) -> Any:
    return xp.where(leaf == 0, 1.0, xp.abs(leaf))
