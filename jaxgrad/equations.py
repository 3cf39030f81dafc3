"""Walks a loss's jaxpr, equation by equation: wider, displaced, its rules set apart."""

from __future__ import annotations

import functools
import inspect
import os
import site
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

_EPS = float(np.finfo(np.float64).eps)
_ClosedJaxpr = jax.extend.core.ClosedJaxpr

Path = tuple[int, ...]
"""Where an equation stands: its number, after those of the equations it stands in."""
Taps = Mapping[Path, tuple[Sequence[Any], Sequence[Any]]]
"""Per equation of a trusted rule: an array, or `None`, per input and per output."""


class Place(NamedTuple):
    """A line of source code."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        where = f"{os.path.basename(self.file)}, line {self.line}"
        return f"`{self.function}` ({where})" if self.line else f"`{self.function}`"


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


@dataclass(frozen=True)
class Walk:
    """How to evaluate.

    Attributes:
      wide: whether what depends on the parameters is computed in float64.
      pairs: whether the point itself is evaluated beside the displaced one.
      hold: with pairs, where `stop_gradient` returns the value at the point: nowhere
        (0), outside of the forward parts of custom rules (1), everywhere (2).
      keep: whether custom rules are kept; else, and where a trusted one is inside,
        their forward parts are walked into.
      taps: what is added to the inputs and outputs of trusted rules.
      pulls: the cotangents of the inputs and outputs of trusted rules, by which their
        outputs are displaced.
      inside: whether the jaxpr is a custom rule's forward part.
      record: if given, the inputs of custom rules are collected; per equation of one,
        it gets which of its inputs depend on the parameters.
      run_on: how many times as many steps again a loop takes that stops by a test of
        what moves.
      callers: the equations that the jaxpr stands in.
      path: where the jaxpr stands.
      notes: gets a line for each equation that could not be computed wider.
    """

    wide: bool = True
    pairs: bool = False
    hold: Any = 1
    keep: bool = False
    taps: Taps = field(default_factory=dict)
    pulls: Taps = field(default_factory=dict)
    inside: bool = False
    record: dict[Path, list[bool]] | None = None
    run_on: int = 0
    callers: tuple[Any, ...] = ()
    path: Path = ()
    notes: list[str] = field(default_factory=list)


class Opaque(ValueError):
    """An equation that can't be evaluated anew: a callback, a kernel."""


Seen = dict[Path, tuple[Any, list[Any]]]
"""Per equation of a custom rule: whether it was run, and its inputs."""


def evaluate(
    closed: Any, values: Sequence[Value], walk: Walk, seen: Seen | None = None
) -> list[Value]:
    """The outputs of a closed jaxpr, for the values of its inputs.

    Raises:
      Opaque: what depends on the parameters goes through a callback or a kernel.
    """
    jaxpr = closed.jaxpr
    seen = {} if seen is None else seen
    environment: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    for variable, const in zip(jaxpr.constvars, closed.consts, strict=True):
        environment[variable] = still(const)

    def read(atom: Any) -> Value:
        if isinstance(atom, jax.extend.core.Literal):
            return still(literal(atom))
        return environment[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in eqn.invars]
        here = replace(walk, path=(*walk.path, number))
        outputs = step_of(eqn, inputs, here, seen)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def literal(atom: Any) -> np.ndarray:
    """A literal's number, in its own dtype."""
    return np.asarray(atom.val, atom.aval.dtype)


def still(value: Any) -> Value:
    """A value that doesn't depend on the parameters."""
    return Value(value, value, moves=False)


def step_of(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    """The outputs of one equation."""
    name = eqn.primitive.name
    if name in _DROPPED:
        return []
    if not any(value.moves for value in inputs):
        return [still(out) for out in bind(eqn, [value.now for value in inputs])]
    if name in _OPAQUE and walk.wide:
        raise Opaque(
            f"`{name}` at {source_of(eqn, *reversed(walk.callers))} can't be evaluated "
            "anew in float64. Pass "
            "reference=, a plain function of (params, *args) that computes the same."
        )
    handler = _HANDLERS.get(name, _plain)
    return handler(eqn, inputs, walk, seen)


def bind(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Applies an equation's primitive, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    functions: Sequence[Any] = ()
    if isinstance(params, tuple):  # before jax 0.10
        functions, params = params
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def wider(array: Any) -> Any:
    """An array of floats in float64, of complex numbers in complex128."""
    wide = _wide_dtype(array.dtype)
    return array if wide == array.dtype else lax.convert_element_type(array, wide)


def _wide_dtype(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.complex128)
    return dtype


def promote(value: Value, walk: Walk, moves: bool = True) -> Value:
    """The value as one that moves, if it should."""
    if not moves or (value.moves and not walk.wide):
        return replace(value, moves=moves)
    if not walk.wide:
        return replace(value, moves=True)
    return replace(value, now=wider(value.now), held=wider(value.held), moves=True)


def _both(
    function: Callable[..., Any], inputs: Sequence[Value], walk: Walk
) -> list[Value]:
    """A function of arrays, applied to the displaced values and to the held ones."""
    now = function([value.now for value in inputs])
    held = function([value.held for value in inputs]) if walk.pairs else now
    return [Value(n, h, moves=True) for n, h in zip(now, held, strict=True)]


def _plain(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    if not walk.wide:
        return _both(lambda operands: bind(eqn, operands), inputs, walk)
    moves = [value.moves for value in inputs]
    inputs = [promote(value, walk) for value in inputs]
    changed = {
        key: _wide_param(value)
        for key, value in eqn.params.items()
        if isinstance(value, np.dtype | jax.extend.core.Jaxpr | _ClosedJaxpr)
    }
    if isinstance(
        eqn.params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset
    ):
        changed["precision"] = None
    try:
        out = _both(lambda operands: bind(eqn, operands, **changed), inputs, walk)
        if walk.pairs and len(out) == 1:
            inputs = [replace(v, moves=m) for v, m in zip(inputs, moves, strict=True)]
            return [replace(out[0], terms=_terms(eqn, inputs, changed, out[0]))]
        return out
    except (TypeError, ValueError, NotImplementedError):
        return _natively(eqn, inputs, walk, seen)


def _terms(
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


def _wide_param(value: Any) -> Any:
    """A dtype made wider, or the jaxpr of a small function of wider numbers."""
    if isinstance(value, np.dtype):
        return _wide_dtype(value)

    def function(*operands: Any) -> list[Any]:
        values = [Value(x, x, moves=True) for x in operands]
        return [out.now for out in evaluate(_closed(value), values, Walk())]

    closed = jax.make_jaxpr(function)(
        *(
            jnp.zeros(variable.aval.shape, _wide_dtype(variable.aval.dtype))
            for variable in _closed(value).jaxpr.invars
        )
    )
    return closed if isinstance(value, _ClosedJaxpr) else closed.jaxpr


def _natively(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    """In the dtypes that the equation has, between wider ones."""
    place = source_of(eqn, *reversed(walk.callers))
    walk.notes.append(f"`{eqn.primitive.name}` at {place}")

    def function(operands: list[Any]) -> list[Any]:
        return [wider(out) for out in bind(eqn, _narrow(eqn, operands))]

    return _both(function, inputs, walk)


def _narrow(eqn: Any, operands: list[Any]) -> list[Any]:
    return [
        lax.convert_element_type(x, atom.aval.dtype)
        if jnp.issubdtype(atom.aval.dtype, jnp.inexact)
        else x
        for x, atom in zip(operands, eqn.invars, strict=True)
    ]


def _bits(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    return (_natively if walk.wide else _plain)(eqn, inputs, walk, seen)


def _drawn(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    """A sample that JAX differentiates implicitly, through its distribution function.

    The sampler rejects draws, so that its own derivative at a fixed key is another.
    """
    if not walk.wide:
        return _plain(eqn, inputs, walk, seen)

    def sample(operands: list[Any]) -> list[Any]:
        return [wider(x) for x in bind(eqn, _narrow(eqn, operands))]

    held = [value.held for value in inputs]
    if not walk.pairs:
        return _both(sample, inputs, walk)
    floats = [i for i, x in enumerate(held) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of_floats(*chosen: Any) -> list[Any]:
        operands = list(held)
        for place, x in zip(floats, chosen, strict=True):
            operands[place] = x
        return sample(operands)

    at = [wider(held[i]) for i in floats]
    steps = [wider(inputs[i].now) - x for i, x in zip(floats, at, strict=True)]
    out, change = jax.jvp(of_floats, at, steps)
    return [Value(y + d, y, moves=True) for y, d in zip(out, change, strict=True)]


def _stop(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    (value,) = inputs
    least = 2 if walk.inside else 1
    if not walk.pairs:
        held = least == 1 or walk.hold == 2
        return [Value(*2 * (lax.stop_gradient(value.now),), True)] if held else [value]
    if not jnp.issubdtype(value.now.dtype, jnp.inexact):
        return [value]
    now = jnp.where(walk.hold >= least, value.held, value.now)
    return [Value(now, value.held, moves=True)]


def _rounded(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    return inputs if walk.wide else _plain(eqn, inputs, walk, seen)


def _inline(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    inner = replace(walk, callers=(*walk.callers, eqn))
    return evaluate(_body(eqn), inputs, inner, seen)


def inlined(eqn: Any) -> Any:
    """The jaxpr of an equation that does nothing but run one; else `None`."""
    return _body(eqn) if eqn.primitive.name in _INLINE else None


def _body(eqn: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr"):
        if key in eqn.params:
            return _closed(eqn.params[key])
    raise KeyError(eqn.primitive.name)


def _closed(jaxpr: Any) -> Any:
    if isinstance(jaxpr, _ClosedJaxpr):
        return jaxpr
    return _ClosedJaxpr(jaxpr, ())


def _custom(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    if walk.record is not None:
        seen[walk.path] = (jnp.array(True), [value.now for value in inputs])
        walk.record[walk.path] = [value.moves for value in inputs]
    inner = _within({**walk.taps, **walk.pulls}, walk.path)
    if walk.keep and (walk.path in inner or not inner):
        before, after = walk.taps.get(walk.path, ((), ()))
        out = bind(eqn, _add([value.now for value in inputs], before))
        return [Value(x, x, moves=True) for x in _add(out, after)]
    within = replace(walk, inside=True, callers=(*walk.callers, eqn))
    outputs = evaluate(_body(eqn), inputs, within, seen)
    outputs = [promote(value, walk) for value in outputs]
    return _trusted(inputs, outputs, walk) if walk.path in walk.pulls else outputs


def _add(arrays: list[Any], taps: Sequence[Any]) -> list[Any]:
    if not taps:
        return arrays
    return [x if t is None else x + t for x, t in zip(arrays, taps, strict=True)]


def _trusted(inputs: list[Value], outputs: list[Value], walk: Walk) -> list[Value]:
    r"""Displaces a trusted rule's outputs as its rule claims.

    For the cotangents $c$ of the outputs $y$ and $R(c)$ of the inputs $x$:
    $y' = y + c \langle R(c), x' - x \rangle / \langle c, c \rangle$, so that
    $\langle c, y' - y \rangle = \langle R(c), x' - x \rangle$ whatever $R$ is.
    """
    pulled, along = walk.pulls[walk.path]
    size = sum(jnp.sum(c**2) for c in along if c is not None)
    change = sum(
        jnp.sum(r * (x.now - _at(x.held, walk)))
        for r, x in zip(pulled, inputs, strict=True)
        if r is not None
    )
    change = jnp.where(size > 0, change / jnp.where(size > 0, size, 1), 0)

    def displaced(y: Value, c: Any) -> Any:
        return jnp.where(walk.hold > 0, _at(y.held, walk) + c * change, y.now)

    return [
        y if c is None else Value(displaced(y, c), y.held, moves=True)
        for y, c in zip(outputs, along, strict=True)
    ]


def _at(held: Any, walk: Walk) -> Any:
    return held if walk.pairs else lax.stop_gradient(held)


def _scan(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    params = eqn.params
    body = params["jaxpr"]
    consts, carry, xs = _scan_parts(params, inputs)
    flags = _scan_flags(params, [value.moves for value in inputs])
    carry = [promote(v, walk, m) for v, m in zip(carry, flags, strict=False)]
    taps, pulls = _within(walk.taps, walk.path), _within(walk.pulls, walk.path)

    def step(carry: Any, row: Any) -> Any:
        row, taps, pulls = row
        inner = replace(walk, taps=taps, pulls=pulls, callers=(*walk.callers, eqn))
        found: Seen = {}
        outputs = evaluate(body, [*consts, *carry, *row], inner, found)
        promoted = [promote(v, walk, m) for v, m in zip(outputs, flags, strict=True)]
        return promoted[: len(carry)], (promoted[len(carry) :], found)

    last, (ys, found) = lax.scan(
        step,
        carry,
        (xs, taps, pulls),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    seen.update(found)
    return [*last, *ys]


def _scan_parts(params: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    if "ft_in" in params:  # from jax 0.12
        parts = params["ft_in"].update(inputs).unpack()
        return tuple(list(part) for part in parts)
    first = params["num_consts"]
    then = first + params["num_carry"]
    return list(inputs[:first]), list(inputs[first:then]), list(inputs[then:])


def _within(entries: Mapping[Path, Any], path: Path) -> dict[Path, Any]:
    return {key: x for key, x in entries.items() if key[: len(path)] == path}


def _while(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    params = eqn.params
    first = params["cond_nconsts"]
    then = first + params["body_nconsts"]
    tests, consts, carry = inputs[:first], inputs[first:then], inputs[then:]
    flags = _while_flags(params, [value.moves for value in inputs])
    carry = [promote(v, walk, m) for v, m in zip(carry, flags, strict=True)]
    inner = replace(walk, record=None, taps={}, callers=(*walk.callers, eqn))

    def going(carry: list[Value]) -> Value:
        return evaluate(params["cond_jaxpr"], [*tests, *carry], inner)[0]

    def body(carry: list[Value]) -> list[Value]:
        after = evaluate(params["body_jaxpr"], [*consts, *carry], inner)
        return [promote(v, walk, m) for v, m in zip(after, flags, strict=True)]

    def goes_on(state: tuple[Any, list[Value]]) -> Any:
        test = going(state[1])
        return jnp.any(test.now | test.held if walk.pairs else test.now)

    def step(state: tuple[Any, list[Value]]) -> tuple[Any, list[Value]]:
        count, carry = state
        test, after = going(carry), body(carry)
        if walk.pairs or test.now.ndim:  # the loops of a batch, and of a pair, as one
            after = [
                Value(
                    _select(test.now, new.now, old.now),
                    _select(test.held, new.held, old.held),
                    new.moves,
                )
                for new, old in zip(after, carry, strict=True)
            ]
        return count + 1, after

    last: tuple[Any, list[Value]]
    last = lax.while_loop(goes_on, step, (jnp.int32(0), carry))
    count, carry = last
    if not (walk.run_on and going(carry).moves):
        return carry
    more = jnp.minimum(walk.run_on * count, _MOST_STEPS)
    further: list[Value]
    further = lax.fori_loop(0, more, lambda _, carry: body(carry), carry)
    return further


# A loop that is run on to convergence takes no more steps than this.
_MOST_STEPS = 10_000


def _select(test: Any, new: Any, old: Any) -> Any:
    return jnp.where(jnp.expand_dims(test, range(test.ndim, new.ndim)), new, old)


def _cond(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    index, *operands = inputs
    branches = eqn.params["branches"]
    flags = _cond_flags(eqn.params, [value.moves for value in inputs])
    sites: Seen = {}
    if walk.record is not None:
        for number, branch in enumerate(branches):
            rules = rule_sites(branch, (*walk.path, number), nested=True)
            sites |= {
                path: (False, [_zeros(atom.aval, walk) for atom in rule.invars])
                for path, (rule, _) in rules.items()
            }

    def branch_at(number: int) -> Callable[..., Any]:
        inner = replace(walk, path=(*walk.path, number))

        def run(operands: list[Value]) -> Any:
            found: Seen = {}
            out = evaluate(branches[number], operands, inner, found)
            promoted = [promote(v, walk, m) for v, m in zip(out, flags, strict=True)]
            if walk.record is None:
                return promoted, {}
            taken = {path: (jnp.array(run), x) for path, (run, x) in sites.items()}
            return promoted, taken | found

        return run

    functions = [branch_at(number) for number in range(len(branches))]
    now, found = lax.switch(index.now, functions, operands)
    seen.update(found)
    if not (index.moves and walk.pairs):
        return now  # type: ignore[no-any-return]
    held, _ = lax.switch(index.held, functions, operands)
    return [replace(n, held=h.held) for n, h in zip(now, held, strict=True)]


def _zeros(aval: Any, walk: Walk) -> Any:
    dtype = _wide_dtype(aval.dtype) if walk.wide else aval.dtype
    return jnp.zeros(aval.shape, dtype)


# How often a solve is refined: its system is that of the point, a step of up to 1 %
# away, so that the error shrinks by that much, times the condition number, each time.
_REFINEMENTS = 8


def _solve(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    """Solves a linear system with the solver's own code, and refines the solution.

    `jnp.linalg.solve` gives its solver the factors of a matrix behind `stop_gradient`,
    and keeps the matrix itself for `matvec`.
    """
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    consts: dict[str, list[Value]] = {}
    start = 0
    for part in ("matvec", "vecmat", "solve", "transpose_solve"):
        length = getattr(lengths, part)
        consts[part] = inputs[start : start + length]
        start += length
    rhs = inputs[start:]
    if walk.keep:
        return _plain(eqn, inputs, walk, seen)

    def apply(part: str, vector: list[Value]) -> list[Value]:
        out = evaluate(
            _closed(getattr(jaxprs, part)), [*consts[part], *vector], walk, seen
        )
        return [promote(value, walk) for value in out]

    rhs = [promote(value, walk) for value in rhs]
    # A second output of the solver, if any, is its report: it stays as it is.
    solution = apply("solve", rhs)
    count = len(rhs)
    if not walk.wide:
        return solution

    def refine(_: Any, x: list[Value]) -> list[Value]:
        product = apply("matvec", x)
        residual = [
            Value(b.now - p.now, b.held - p.held, moves=True)
            for b, p in zip(rhs, product, strict=True)
        ]
        step = apply("solve", residual)[:count]
        return [
            Value(v.now + s.now, v.held + s.held, moves=True)
            for v, s in zip(x, step, strict=True)
        ]

    refined = lax.fori_loop(0, _REFINEMENTS, refine, solution[:count])
    return [*refined, *solution[count:]]


# Which variables depend on the parameters, without computing any.


def _moving(closed: Any, flags: Sequence[bool]) -> list[bool]:
    environment = dict(zip(closed.jaxpr.invars, flags, strict=True))
    for eqn in closed.jaxpr.eqns:
        inputs = [
            not isinstance(atom, jax.extend.core.Literal)
            and environment.get(atom, False)
            for atom in eqn.invars
        ]
        outputs = [any(inputs)] * len(eqn.outvars)
        name = eqn.primitive.name
        if any(inputs):
            if name in _INLINE or name in _CUSTOM:
                outputs = _moving(_body(eqn), inputs)
            elif name == "scan":
                outputs = _scan_flags(eqn.params, inputs)
            elif name == "while":
                outputs = _while_flags(eqn.params, inputs)
            elif name == "cond":
                outputs = _cond_flags(eqn.params, inputs)
        environment.update(zip(eqn.outvars, outputs, strict=True))
    return [
        not isinstance(atom, jax.extend.core.Literal) and environment.get(atom, False)
        for atom in closed.jaxpr.outvars
    ]


def _scan_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    consts, carry, xs = _scan_parts(params, flags)
    while True:
        out = _moving(params["jaxpr"], [*consts, *carry, *xs])
        after = [a or b for a, b in zip(carry, out, strict=False)]
        if after == carry:
            return [*carry, *out[len(carry) :]]
        carry = after


def _while_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    first = params["cond_nconsts"]
    then = first + params["body_nconsts"]
    tests, consts, carry = flags[:first], flags[first:then], list(flags[then:])
    while True:
        if _moving(params["cond_jaxpr"], [*tests, *carry])[0]:
            return [True] * len(carry)
        out = _moving(params["body_jaxpr"], [*consts, *carry])
        after = [a or b for a, b in zip(carry, out, strict=True)]
        if after == carry:
            return carry
        carry = after


def _cond_flags(params: Mapping[str, Any], flags: Sequence[bool]) -> list[bool]:
    branches = [_moving(branch, flags[1:]) for branch in params["branches"]]
    return [flags[0] or any(out) for out in zip(*branches, strict=True)]


_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_INLINE = (
    "jit",
    "pjit",
    "remat2",
    "remat",
    "checkpoint",
    "closed_call",
    "core_call",
    "core_closed_call",
    "custom_vmap_call",
)
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
_DROPPED = ("debug_callback", "debug_print")
_OPAQUE = ("pure_callback", "io_callback", "ffi_call", "pallas_call")
_HANDLERS: dict[str, Callable[[Any, list[Value], Walk, Seen], list[Value]]] = {
    **dict.fromkeys(_INLINE, _inline),
    **dict.fromkeys(_CUSTOM, _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _solve,
    "stop_gradient": _stop,
    "reduce_precision": _rounded,
    "bitcast_convert_type": _bits,
    "random_gamma": _drawn,
}


def rule_sites(
    closed: Any,
    path: Path = (),
    lengths: tuple[int, ...] = (),
    *,
    nested: bool = False,
) -> dict[Path, tuple[Any, tuple[int, ...]]]:
    """The equations of custom rules, and the lengths of the scans they stand in.

    Not those in a while loop, which has no reverse mode; those in another rule's
    forward part only if `nested`.
    """
    sites: dict[Path, tuple[Any, tuple[int, ...]]] = {}
    for number, eqn in enumerate(closed.jaxpr.eqns):
        here, name = (*path, number), eqn.primitive.name
        if name in _CUSTOM:
            sites[here] = (eqn, lengths)
        if name in _INLINE or (nested and name in _CUSTOM):
            sites |= rule_sites(_body(eqn), here, lengths, nested=nested)
        elif name == "scan":
            inner = (*lengths, eqn.params["length"])
            sites |= rule_sites(eqn.params["jaxpr"], here, inner, nested=nested)
        elif name == "cond":
            for branch, inside in enumerate(eqn.params["branches"]):
                sites |= rule_sites(inside, (*here, branch), lengths, nested=nested)
    return sites


def equations(closed: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those inside others too, from the outside in."""
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def bodies(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, closed."""
    items = [
        item
        for value in eqn.params.values()
        for item in (value if isinstance(value, tuple) else (value,))
    ]
    kinds = jax.extend.core.Jaxpr, _ClosedJaxpr
    return [_closed(item) for item in items if isinstance(item, kinds)]


def taps_of(
    closed: Any, trusted: Callable[[Place], bool]
) -> dict[Path, tuple[list[Any], list[Any]]]:
    """Zeros to add to the floating inputs and outputs of trusted rules."""

    def zeros(atoms: Sequence[Any], lengths: tuple[int, ...]) -> list[Any]:
        return [
            jnp.zeros((*lengths, *atom.aval.shape), atom.aval.dtype)
            if jnp.issubdtype(atom.aval.dtype, jnp.floating)
            else None
            for atom in atoms
        ]

    taps: dict[Path, tuple[list[Any], list[Any]]] = {}
    for path, (eqn, lengths) in rule_sites(closed, nested=True).items():
        inside = any(path[: len(outer)] == outer for outer in taps)
        if trusted(rule_place(eqn)) and not inside:
            taps[path] = zeros(eqn.invars, lengths), zeros(eqn.outvars, lengths)
    return taps


def rule_place(eqn: Any) -> Place:
    """The function, file and line of an equation's custom rule."""
    info = _body(eqn).jaxpr.debug_info.func_src_info or "a function"
    name, _, where = info.partition(" at ")
    file, _, line = where.rpartition(":")
    return Place(name, file, int(line) if line.isdigit() else 0)


def function_place(function: Callable[..., Any]) -> Place:
    """The place of a function, as `rule_place` would give it."""
    inner = inspect.unwrap(getattr(function, "fun", function))
    code = getattr(inner, "__code__", None)
    if code is None:
        return Place(getattr(inner, "__name__", type(inner).__name__), "", 0)
    return Place(inner.__name__, code.co_filename, code.co_firstlineno)


_LIBRARIES = tuple(
    {
        os.path.realpath(folder) + os.sep
        for folder in (
            *site.getsitepackages(),
            site.getusersitepackages(),
            sysconfig.get_path("stdlib"),
            os.path.dirname(__file__),
        )
    }
)


def in_library(file: str) -> bool:
    """Whether a file is the standard library's, an installed package's, or ours."""
    return os.path.realpath(file).startswith(_LIBRARIES)


def source_of(*eqns: Any) -> Place:
    """The innermost line outside of libraries of the first equation that has one.

    Equations inside `jit` have none: those that they stand in come next.
    """
    for eqn in eqns:
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback else []:
            if not in_library(frame.file_name):
                name = frame.function_name.rpartition(".<locals>.")[2]
                return Place(name, frame.file_name, frame.line_num)
    return Place("a library's function", "", 0)
