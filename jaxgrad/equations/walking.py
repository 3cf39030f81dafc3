"""Walks a jaxpr, equation by equation: wider, displaced, its rules set apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad.equations.dependence import (
    cond_flags,
    scan_flags,
    scan_parts,
    while_flags,
)
from jaxgrad.equations.sites import (
    CUSTOM,
    DROPPED,
    INLINE,
    ClosedJaxpr,
    Path,
    Taps,
    body_of,
    closed_jaxpr,
    rule_sites,
    source_of,
)
from jaxgrad.equations.values import (
    Value,
    bind,
    literal,
    still,
    terms_of,
    wide_dtype,
    wider,
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


def step_of(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    """The outputs of one equation."""
    name = eqn.primitive.name
    if name in DROPPED:
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
        if isinstance(value, np.dtype | jax.extend.core.Jaxpr | ClosedJaxpr)
    }
    if isinstance(
        eqn.params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset
    ):
        # (None would become what `jax.default_matmul_precision` says, in a `vmap`.)
        changed["precision"] = (lax.Precision.HIGHEST,) * 2
    try:
        out = _both(lambda operands: bind(eqn, operands, **changed), inputs, walk)
        if walk.pairs and len(out) == 1:
            inputs = [replace(v, moves=m) for v, m in zip(inputs, moves, strict=True)]
            return [replace(out[0], terms=terms_of(eqn, inputs, changed, out[0]))]
        return out
    except (TypeError, ValueError, NotImplementedError):
        return _natively(eqn, inputs, walk, seen)


def _wide_param(value: Any) -> Any:
    """A dtype made wider, or the jaxpr of a small function of wider numbers."""
    if isinstance(value, np.dtype):
        return wide_dtype(value)

    def function(*operands: Any) -> list[Any]:
        values = [Value(x, x, moves=True) for x in operands]
        return [out.now for out in evaluate(closed_jaxpr(value), values, Walk())]

    closed = jax.make_jaxpr(function)(
        *(
            jnp.zeros(variable.aval.shape, wide_dtype(variable.aval.dtype))
            for variable in closed_jaxpr(value).jaxpr.invars
        )
    )
    return closed if isinstance(value, ClosedJaxpr) else closed.jaxpr


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
    return evaluate(body_of(eqn), inputs, inner, seen)


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
    outputs = evaluate(body_of(eqn), inputs, within, seen)
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
    consts, carry, xs = scan_parts(params, inputs)
    flags = scan_flags(params, [value.moves for value in inputs])
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


def _within(entries: Mapping[Path, Any], path: Path) -> dict[Path, Any]:
    return {key: x for key, x in entries.items() if key[: len(path)] == path}


def _while(eqn: Any, inputs: list[Value], walk: Walk, seen: Seen) -> list[Value]:
    params = eqn.params
    first = params["cond_nconsts"]
    then = first + params["body_nconsts"]
    tests, consts, carry = inputs[:first], inputs[first:then], inputs[then:]
    flags = while_flags(params, [value.moves for value in inputs])
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
    flags = cond_flags(eqn.params, [value.moves for value in inputs])
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
    dtype = wide_dtype(aval.dtype) if walk.wide else aval.dtype
    return jnp.zeros(aval.shape, dtype)


# How often a solve is refined: its system is that of the point, a step away, so that
# the error shrinks by the step's share, times the condition number, each time. Where a
# long step doesn't converge, shorter ones do.
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
            closed_jaxpr(getattr(jaxprs, part)), [*consts[part], *vector], walk, seen
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


_OPAQUE = ("pure_callback", "io_callback", "ffi_call", "pallas_call")

_HANDLERS: dict[str, Callable[[Any, list[Value], Walk, Seen], list[Value]]] = {
    **dict.fromkeys(INLINE, _inline),
    **dict.fromkeys(CUSTOM, _custom),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _solve,
    "stop_gradient": _stop,
    "reduce_precision": _rounded,
    "bitcast_convert_type": _bits,
    "random_gamma": _drawn,
}
