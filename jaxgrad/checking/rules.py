"""Checks each custom rule of a loss alone, at the values that it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.leaves import (
    Leaf,
    leaf_of,
    linear,
    on_host,
    pick,
    read_of_leaf,
)
from jaxgrad.checking.problem import Problem, equations_of, project
from jaxgrad.checking.report import BAD, LeafCheck, RuleCheck, Verdict
from jaxgrad.compiling import Program
from jaxgrad.equations import (
    Path,
    Place,
    Value,
    Walk,
    bind,
    evaluate,
    in_library,
    rule_place,
    rule_sites,
    still,
    wider,
)
from jaxgrad.placing import numbers_of

# A rule is checked at so many of the places that call it, and iterations of a loop; at
# more, of all together, only if these show nothing.
_CALLS = 3
_MORE_CALLS = 32
_MORE_ITERATIONS = 64

Judge = Callable[[Problem], Sequence[LeafCheck]]


def check_rules(problem: Problem, judge: Judge, seed: int) -> list[RuleCheck]:
    """The verdict on each custom rule that the parameters go through.

    `judge` gives the verdict on each leaf of a problem. The rules of libraries are
    checked only where none of the user's is wrong.
    """
    sites = rule_sites(problem.loss, nested=True)
    seen, moving = _seen(problem)
    calls: dict[Place, list[Path]] = {}
    for path in sites:
        if any(moving.get(path, [])):
            calls.setdefault(rule_place(sites[path][0]), []).append(path)

    def checked(place: Place, paths: Sequence[Path], stacked: bool) -> RuleCheck:
        if problem.trusted(place):
            return RuleCheck(*place, "right", None, None, None, "trusted, as asked")
        try:
            some = [
                call
                for path in paths
                for call in _calls(
                    sites[path][0], seen[path][0], seen[path][1], moving[path], stacked
                )
            ]
        except Exception as error:  # such as rows that explicit axes split
            return _unchecked(place, error)
        return _check(place, some, judge, seed)

    def all_of(places: list[Place]) -> list[RuleCheck]:
        rows = [checked(place, calls[place][:_CALLS], False) for place in places]
        if any(row.verdict == "wrong" for row in rows):
            return rows
        return [
            checked(place, calls[place][:_MORE_CALLS], True)
            if _has_more(place)
            else row
            for place, row in zip(places, rows, strict=True)
        ]

    def _has_more(place: Place) -> bool:
        paths = calls[place]
        return len(paths) > _CALLS or any(np.size(seen[p][0]) > _CALLS for p in paths)

    rows = all_of([place for place in calls if not in_library(place.file)])
    if not any(row.verdict == "wrong" for row in rows):
        rows += all_of([place for place in calls if in_library(place.file)])
    return rows


def _seen(problem: Problem) -> tuple[dict[Path, Any], dict[Path, list[bool]]]:
    """The inputs of each custom rule's calls, and which of them move."""
    record: dict[Path, list[bool]] = {}

    def run(values: list[Any], fixed: list[Any], consts: Any) -> Any:
        found: dict[Path, Any] = {}
        moving = [Value(x, x, moves=True) for x in values]
        closed = jax.extend.core.ClosedJaxpr(problem.loss.jaxpr, consts)
        walk = Walk(wide=False, record=record)
        evaluate(closed, [*moving, *map(still, fixed)], walk, found)
        return found

    operands = problem.values, problem.fixed, problem.loss.consts
    return Program(run, problem.size, *operands)(*operands), record


class _Call:
    """A call of a rule, or several: the inputs that are differentiated set apart."""

    def __init__(
        self, eqn: Any, inputs: list[Any], moving: list[bool], stacked: bool
    ) -> None:
        self.eqn = eqn
        self.stacked = stacked
        self.chosen = [
            k
            for k, (x, m) in enumerate(zip(inputs, moving, strict=True))
            if m and jnp.issubdtype(x.dtype, jnp.floating)
        ]
        self.values = [inputs[k] for k in self.chosen]
        self.fixed = [x for k, x in enumerate(inputs) if k not in self.chosen]

    def outputs(self, values: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        """What the rule's function returns."""
        if self.stacked:
            return list(jax.lax.map(lambda both: self._once(*both), (values, fixed)))
        return self._once(values, fixed)

    def _once(self, values: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        stock = iter(fixed)
        places = dict(zip(self.chosen, values, strict=True))
        count = len(values) + len(fixed)
        return bind(
            self.eqn, [places[k] if k in places else next(stock) for k in range(count)]
        )


def _calls(
    eqn: Any, ran: Any, inputs: list[Any], moving: list[bool], stacked: bool
) -> list[_Call]:
    """The calls of one equation: some of the iterations of the loops it stands in."""
    places = np.argwhere(numbers_of(ran))
    most = _MORE_ITERATIONS if stacked else _CALLS
    if len(places) > most:
        places = places[np.linspace(0, len(places) - 1, most).astype(int)]
    if not np.ndim(ran) or not len(places):
        return [_Call(eqn, inputs, moving, stacked=False) for _ in places]
    if stacked:
        rows = [x[tuple(places.T)] for x in inputs]
        return [_Call(eqn, rows, moving, stacked=True)]
    return [
        _Call(eqn, [x[tuple(place)] for x in inputs], moving, stacked=False)
        for place in places
    ]


def _check(place: Place, calls: list[_Call], judge: Judge, seed: int) -> RuleCheck:
    best = RuleCheck(*place, "right", None, None, None, "was not called here")
    order: Sequence[Verdict] = ("wrong", "nonfinite", "undecided", "right")
    for number, call in enumerate(calls):
        try:
            row = _check_call(place, call, judge, seed)
        except Exception as error:  # of whatever kind: other rules are to be checked
            row = _unchecked(place, error)
        if not number or order.index(row.verdict) < order.index(best.verdict):
            best = row
        if best.verdict == "wrong":
            break
    return best


def _unchecked(place: Place, error: Exception) -> RuleCheck:
    why = f"{error}".partition("\n")[0].partition(". Pass")[0]
    text = f"not checked alone: {why}"
    return RuleCheck(*place, "undecided", None, None, None, text)


def _check_call(place: Place, call: _Call, judge: Judge, seed: int) -> RuleCheck:
    if not call.values:
        return RuleCheck(*place, "right", None, None, None, "has no floating operand")
    text = _other_value(call)
    if text:
        return RuleCheck(*place, "wrong", None, None, None, text)

    def function(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        rng = np.random.default_rng(seed)
        out = call.outputs(values, fixed)
        return sum(project(x, rng) for x in out if jnp.issubdtype(x.dtype, jnp.inexact))

    names = tuple(f"operand {k} of {place.function}" for k in call.chosen)
    leaves = judge(equations_of(names, call.values, call.fixed, function))
    for verdict in BAD:
        for operand, leaf in zip(call.chosen, leaves, strict=True):
            if leaf.verdict == verdict:
                text = leaf.cause.text if leaf.cause else leaf.text
                return RuleCheck(
                    *place, verdict, operand, leaf.relative_error, leaf.cause, text
                )
    error = max((leaf.relative_error or 0.0 for leaf in leaves), default=0.0)
    return RuleCheck(*place, "right", None, error, None, "")


# Values that differ by less than this share of themselves are the same in float32.
_SAME = 1e-7


def _other_value(call: _Call) -> str:
    """Says if a rule's forward part returns other values than its function."""

    def forward(values: list[Any], fixed: list[Any]) -> Any:
        return jax.vjp(lambda v: call.outputs(v, fixed), values)[0]

    plain = jax.make_jaxpr(call.outputs)(call.values, call.fixed)
    ruled = jax.make_jaxpr(forward)(call.values, call.fixed)

    def run(values: list[Any], fixed: list[Any]) -> Any:
        inputs = [*(Value(x, x, moves=True) for x in values), *map(still, fixed)]
        return [[v.now for v in evaluate(c, inputs, Walk())] for c in (plain, ruled)]

    with jax.enable_x64(True):
        operands = on_host(([wider(x) for x in call.values], call.fixed))
        outputs = Program(run, 0, *operands)(*operands)
    for number, (a, b) in enumerate(zip(*outputs, strict=True)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            continue
        place, more, ours, right = _apart(leaf_of(b, a), leaf_of(a, a))
        if more > 0:
            worst = np.unravel_index(int(place), a.shape)
            index = f"{[int(i) for i in worst]} of " if a.ndim else ""
            return (
                f"its forward part returns {ours:.8g} where the function returns "
                f"{right:.8g} (in {index}output {number})"
            )
    return ""


@read_of_leaf
def _apart(xp: Any, ours: Leaf, right: Leaf) -> Any:
    """Where two arrays differ most, by how much too much, and what is there."""
    size = xp.abs(right)
    more = xp.abs(ours - right) - _SAME * size - 1e-12 * size.max(initial=0.0)
    most = more.max(initial=-xp.inf)
    if xp is np:
        place = np.argmax(more) if more.size else 0
    else:
        place = xp.where(more == most, linear(more.shape), more.size).min()
    there = [pick(xp, x, xp.asarray([place]))[0] for x in (ours, right)]
    return place, most, *there
