"""Checks each custom rule of a loss alone, at the values that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxgrad.checking.problem import Problem, Program, equations_of, project
from jaxgrad.checking.report import LeafCheck, RuleCheck, Verdict
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
)

# A rule is checked at so many of the places that call it, and iterations of a loop.
_CALLS = 3

Judged = tuple[Sequence[LeafCheck], tuple[float, float] | None]


def check_rules(
    problem: Problem, judge: Callable[[Problem], Judged], seed: int
) -> list[RuleCheck]:
    """The verdict on each custom rule that the parameters go through.

    `judge` gives the verdict on each leaf of a problem, and, where they differ, the
    value of the function and the one that its gradient's forward part returns. The
    rules of libraries are checked only where none of the user's is wrong.
    """
    sites = rule_sites(problem.loss, nested=True)
    seen, moving = _seen(problem)
    calls: dict[Place, list[Path]] = {}
    for path in sites:
        if any(moving.get(path, [])):
            calls.setdefault(rule_place(sites[path][0]), []).append(path)

    def checked(places: Iterable[Place]) -> list[RuleCheck]:
        rows = []
        for place in places:
            if problem.trusted(place):
                text = "trusted, as asked"
                rows.append(RuleCheck(*place, "right", None, None, None, text))
                continue
            some = [
                call
                for path in calls[place][:_CALLS]
                for call in _calls(sites[path][0], *seen[path], moving[path])
            ]
            rows.append(_check(place, some, judge, seed))
        return rows

    rows = checked(place for place in calls if not in_library(place.file))
    if not any(row.verdict == "wrong" for row in rows):
        rows += checked(place for place in calls if in_library(place.file))
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
    """One call of a rule: its inputs, with those that are differentiated set apart."""

    def __init__(self, eqn: Any, inputs: list[Any], moving: list[bool]) -> None:
        self.eqn = eqn
        self.chosen = [
            k
            for k, (x, m) in enumerate(zip(inputs, moving, strict=True))
            if m and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        ]
        self.values = [inputs[k] for k in self.chosen]
        self.fixed = [x for k, x in enumerate(inputs) if k not in self.chosen]

    def outputs(self, values: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        stock = iter(fixed)
        places = dict(zip(self.chosen, values, strict=True))
        count = len(values) + len(fixed)
        return bind(
            self.eqn, [places[k] if k in places else next(stock) for k in range(count)]
        )


def _calls(eqn: Any, ran: Any, inputs: list[Any], moving: list[bool]) -> list[_Call]:
    """The calls of one equation: some of the iterations of the loops it stands in."""
    ran = np.asarray(ran)
    places = np.argwhere(ran)
    if len(places) > _CALLS:
        places = places[np.linspace(0, len(places) - 1, _CALLS).astype(int)]
    return [
        _Call(eqn, [x[tuple(place)] if len(place) else x for x in inputs], moving)
        for place in places
    ]


def _check(
    place: Place,
    calls: list[_Call],
    judge: Callable[[Problem], Judged],
    seed: int,
) -> RuleCheck:
    rows = [_check_call(place, call, judge, seed) for call in calls]
    if not rows:
        return RuleCheck(*place, "right", None, None, None, "was not called here")
    return min(rows, key=lambda row: row.verdict != "wrong")


def _check_call(
    place: Place, call: _Call, judge: Callable[[Problem], Judged], seed: int
) -> RuleCheck:
    if not call.values:
        return RuleCheck(*place, "right", None, None, None, "has no floating operand")
    names = tuple(f"operand {k}" for k in call.chosen)

    def function(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        rng = np.random.default_rng(seed)
        out = call.outputs(values, fixed)
        return sum(
            project(x, rng)
            for x in out
            if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        )

    problem = equations_of(names, call.values, call.fixed, function)
    leaves, values = judge(problem)
    if values:
        text = (
            "its forward part returns other values than the function: a projection of "
            f"them is {values[1]:.8g}, the function's is {values[0]:.8g}"
        )
        return RuleCheck(*place, "wrong", None, None, None, text)
    bad: Sequence[Verdict] = ("wrong", "nonfinite", "undecided")
    for verdict in bad:
        for operand, leaf in zip(call.chosen, leaves, strict=True):
            if leaf.verdict == verdict:
                text = leaf.cause.text if leaf.cause else leaf.text
                return RuleCheck(
                    *place, verdict, operand, leaf.relative_error, leaf.cause, text
                )
    error = max((leaf.relative_error or 0.0 for leaf in leaves), default=0.0)
    return RuleCheck(*place, "right", None, error, None, "")
