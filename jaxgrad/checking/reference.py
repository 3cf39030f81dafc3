"""The reference: derivatives of a loss from its values alone, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

from jaxgrad.checking.leaves import (
    Leaf,
    on_host,
    operand,
    shared,
    stacked,
    unmoved,
    zeros_like,
)
from jaxgrad.checking.problem import Problem
from jaxgrad.compiling import Program
from jaxgrad.differences import LADDER, Slope, slope_of
from jaxgrad.equations import (
    Opaque,
    Value,
    Walk,
    bodies,
    equations,
    evaluate,
    rule_sites,
    still,
    wider,
)
from jaxgrad.placing import numbers_of


class Probe(NamedTuple):
    """A direction in one leaf, made when it's needed."""

    leaf: int
    direction: Callable[[], Leaf]


class OutOfBudget(Exception):
    """More evaluations are needed than `max_evaluations` allows."""


_EPS = float(np.finfo(np.float64).eps)
# No change at all is taken to be none, to within so many roundings of the loss.
_QUANTA = 1000
# Values at displaced points that are computed together may take this many numbers.
_TOGETHER = 16_000_000
# Where an equation keeps its own dtype, its rounding asks for steps this much longer.
_LONGER = 30
# Steps that are tried first: they do for smooth losses and for relu nets. Fewer where
# an evaluation takes long.
_STEPS, _FEW_STEPS = slice(3, 10), slice(6, 10)


def _largest(sizes: np.ndarray) -> float:
    return float(np.max(sizes, where=np.isfinite(sizes), initial=0.0))


class Reference:
    """Evaluates a loss at displaced points, and takes slopes of what it gives.

    Attributes:
      program: what evaluates it.
      point: the parameters, in float64.
      pulls: the cotangents of the inputs and outputs of trusted rules, to be set.
      notes: the equations that could not be computed wider.
      evaluations: how often the loss has been evaluated.
      rounding: the largest rounding error of its values that was seen.
      scale: the size of its value, or of the numbers that it's a sum of.
      coarse: whether the loss may change in steps larger than float64's rounding, by
        a loop that stops at a tolerance, or an equation that keeps its own dtype.
      stops: whether the loss has a `stop_gradient` or a trusted rule.
      inner_stops: whether a custom rule's forward part has a `stop_gradient`.
    """

    def __init__(
        self, problem: Problem, max_evaluations: int | None, run_on: int = 0
    ) -> None:
        self.problem = problem
        self.notes: list[str] = []
        self.evaluations = 0
        self.rounding = 0.0
        self.scale = 0.0
        self._budget = max_evaluations
        names = {eqn.primitive.name for eqn in equations(problem.loss)}
        self.stops = "stop_gradient" in names or bool(problem.taps)
        self.coarse = "while" in names
        rules = [eqn for eqn, _ in rule_sites(problem.loss).values()]
        self.inner_stops = any(
            eqn.primitive.name == "stop_gradient"
            for rule in rules
            for body in bodies(rule)
            for eqn in equations(body)
        )
        with jax.enable_x64(True):
            pulls = jax.tree.map(wider, problem.taps)
            self.point, self._fixed, self._consts, self.pulls = on_host(
                (
                    [wider(x) for x in problem.values],
                    problem.fixed,
                    problem.loss.consts,
                    pulls,
                )
            )
            self.pulls = shared(self.pulls, self.point)
            # A direction that moves nothing in a leaf, made once.
            kinds = [(x.shape, x.sharding) for x in self.point]
            zeros = {
                kind: zeros_like(x) for kind, x in zip(kinds, self.point, strict=True)
            }
            self._still = [zeros[kind] for kind in kinds]
        sizes = sum(int(np.prod(x.shape)) for x in problem.values) + problem.size
        self._sizes = sizes
        self._here: float | None = None
        self._first: list[float] = []
        self._rest: list[float] = []
        at_once = 2 * len(LADDER) * sizes <= _TOGETHER
        try:
            self.program = self._program(Walk(pairs=True, run_on=run_on), at_once)
        except NotImplementedError:  # something in the loss can't be batched
            self.program = self._program(Walk(pairs=True, run_on=run_on), False)
        if self.notes:
            self.coarse = True
            self._first = [h * _LONGER for h in self._first]
            self._rest = [h * _LONGER for h in self._rest]

    def _plan(self, at_once: bool) -> None:
        """How many directions and steps are evaluated together."""
        chosen = _STEPS if at_once else _FEW_STEPS
        self._at_once = at_once
        self._first = list(LADDER[chosen])
        self._rest = [h for h in LADDER if h not in self._first]
        self._width = 2 * len(self._first) + 1
        most = min(_TOGETHER // (self._width * self._sizes), 8)
        self._probes = max(most, 1) if at_once else 1

    def _program(self, walk: Walk, at_once: bool) -> Program:
        """Compiles many directions and steps at once, or one step after another."""
        self._plan(at_once)
        self.notes.clear()
        loss, dtypes = self.problem.loss.jaxpr, [x.dtype for x in self.problem.values]

        def changed(
            point: Any,
            fixed: Any,
            consts: Any,
            pulls: Any,
            move: Any,
            h: Any,
            hold: Any,
        ) -> Any:
            moved = [
                Value(x + h * d, x, moves=True)
                for x, d in zip(point, move, strict=True)
            ]
            if not walk.wide:
                moved = [v.astype(t) for v, t in zip(moved, dtypes, strict=True)]
            here = replace(walk, hold=hold, pulls=pulls, notes=self.notes)
            closed = jax.extend.core.ClosedJaxpr(loss, consts)
            out = evaluate(closed, [*moved, *map(still, fixed)], here)[0]
            return [wider(x) for x in (*out.change(), out.held)]

        def stepwise(*operands: Any) -> Any:
            *point, steps, hold = operands  # what the point gives is computed once
            return jax.lax.map(lambda h: changed(*point, h, hold), steps)  # type: ignore[call-arg]

        steps = jax.vmap(changed, (None, None, None, None, None, 0, None))
        together = jax.vmap(steps, (None, None, None, None, 0, None, 0))
        function = together if at_once else stepwise
        with jax.enable_x64(True):
            operands = self._operands([], [0.0], 1)
            try:
                size = self.problem.size if at_once else self._sizes
                return Program(function, size, *operands)
            except (Opaque, NotImplementedError):
                raise
            except Exception:
                if not walk.wide:
                    raise
        program = self._program(replace(walk, wide=False), at_once)
        self.notes[:] = ["the loss as a whole"]
        return program

    @property
    def here(self) -> float:
        """The loss at the point, in float64; NaN where no evaluation is allowed."""
        if self._here is None:
            nowhere = Probe(0, lambda: unmoved(self.point[0]))
            with contextlib.suppress(OutOfBudget):
                self._values([nowhere], [LADDER[-1]], 1)
        return float("nan") if self._here is None else self._here

    def slopes(
        self, probes: Sequence[Probe], wanted: Sequence[float] = (), hold: int = 1
    ) -> list[Slope]:
        """The derivative along each direction.

        Args:
          probes: the directions.
          wanted: the error below which each derivative need not be any better; by
            default a millionth of it.
          hold: as in `Walk`.

        Raises:
          OutOfBudget: it would take more evaluations than are allowed.
        """
        first, rest = self._first, self._rest
        rows = self._values(probes, first, hold)
        slopes = [self._slope(first, row) for row in rows]
        goals = list(wanted) or [1e-6 * abs(slope.value) for slope in slopes]
        again = [
            k
            for k, (slope, goal) in enumerate(zip(slopes, goals, strict=True))
            if slope.kink or not slope.error <= goal
        ]
        more = self._values([probes[k] for k in again], rest, hold)
        ladder = [*first, *rest]
        order = np.argsort(ladder)[::-1]
        for k, row in zip(again, more, strict=True):
            both = np.concatenate([rows[k], row], axis=2)[:, :, order]
            slopes[k] = self._slope([ladder[j] for j in order], both)
        return slopes

    def _slope(self, ladder: Sequence[float], row: np.ndarray) -> Slope:
        (ahead, moved, sizes), (behind, *_) = row
        quantum = _QUANTA * _EPS * max(_largest(sizes), abs(self.here))
        self.scale = max(self.scale, _largest(sizes), abs(self.here))
        changes = np.abs([ahead, behind])
        # Where every step shows a change, their scatter tells of rounding by itself.
        least = 0.0 if changes.all() else _EPS * _largest(moved)
        if self.coarse and not changes.all() and changes.any():
            least = max(least, float(changes[changes > 0].min()))
        slope = slope_of(ladder, ahead, behind, least, quantum)
        self.rounding = max(self.rounding, slope.rounding)
        return slope

    def _values(
        self, probes: Sequence[Probe], steps: Sequence[float], hold: int
    ) -> list[np.ndarray]:
        """Per probe, ahead and behind: the changes at each step, and their sizes."""
        if not probes or not steps:
            return [np.zeros((2, 3, 0))] * len(probes)
        most = (self._width - 1) // 2
        if len(steps) > most:
            both = (self._values(probes, s, hold) for s in (steps[:most], steps[most:]))
            return [np.concatenate(pair, axis=2) for pair in zip(*both, strict=True)]
        count = 2 * len(probes) * len(steps)
        if self._budget is not None and self.evaluations + count > self._budget:
            raise OutOfBudget
        self.evaluations += count
        signed = [*steps, *(-h for h in steps)]
        rows = []
        with jax.enable_x64(True):
            for start in range(0, len(probes), self._probes):
                some = probes[start : start + self._probes]
                got = self.program(*self._operands(some, signed, hold))
                by, moved, size, here = (np.atleast_2d(numbers_of(x)) for x in got)
                by = by - by[:, -1:]  # by which two compiled copies of it differ
                self._here = float(here[0, 0])
                for row in np.stack([by, moved, size], axis=1)[: len(some)]:
                    parts = row[:, : len(steps)], row[:, len(steps) : len(signed)]
                    rows.append(np.stack(parts))
        return rows

    def _operands(
        self, probes: Sequence[Probe], steps: Sequence[float], hold: int
    ) -> list[Any]:
        point = self.point, self._fixed, self._consts, self.pulls
        padded = np.zeros(self._width)
        padded[: len(steps)] = steps
        if not self._at_once:
            moves = list(self._still)
            for probe in probes:
                moves[probe.leaf] = operand(probe.direction(), moves[probe.leaf])
            return [*point, moves, padded, np.int32(hold)]
        rows: list[dict[int, Leaf]] = [{} for _ in self._still]
        for row, probe in enumerate(probes):
            rows[probe.leaf][row] = probe.direction()
        several = [
            stacked(parts, self._probes, like)
            for parts, like in zip(rows, self._still, strict=True)
        ]
        return [*point, several, padded, np.full(self._probes, hold, np.int32)]
