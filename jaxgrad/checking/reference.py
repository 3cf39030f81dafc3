"""The reference: derivatives of a loss from its values alone, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.problem import Problem, compiled, on_host, spread
from jaxgrad.differences import LADDER, Slope, slope_of
from jaxgrad.equations import (
    Taps,
    Value,
    Walk,
    bodies,
    equations,
    evaluate,
    rule_sites,
    still,
    wider,
)


class Probe(NamedTuple):
    """A direction in one leaf, made when it's needed."""

    leaf: int
    direction: Callable[[], np.ndarray]


class OutOfBudget(Exception):
    """More evaluations are needed than `max_evaluations` allows."""


_EPS = float(np.finfo(np.float64).eps)
# No change at all is taken to be none, to within so many roundings of the loss.
_QUANTA = 1000
# Values at displaced points that are computed together may take this many numbers.
_TOGETHER = 16_000_000
# Where an equation keeps its own dtype, its rounding asks for steps this much longer.
_LONGER = 30
# Steps of the ladder that are tried first where each evaluation takes long; they do
# for smooth losses, and for relu nets.
_FIRST = slice(2, 7)


class Reference:
    """Evaluates a loss at displaced points, and takes slopes of what it gives.

    Attributes:
      here: the loss at the point, in float64.
      notes: the equations that could not be computed wider.
      evaluations: how often the loss has been evaluated.
      rounding: the largest rounding error of its values that was seen.
      stops: whether the loss has a `stop_gradient` or a trusted rule.
      inner_stops: whether a custom rule's forward part has a `stop_gradient`.
    """

    def __init__(
        self, problem: Problem, pulls: Taps, max_evaluations: int | None
    ) -> None:
        self.problem = problem
        self.notes: list[str] = []
        self.evaluations = 0
        self.rounding = 0.0
        self._budget = max_evaluations
        names = {eqn.primitive.name for eqn in equations(problem.loss)}
        self.stops = "stop_gradient" in names or bool(problem.taps)
        rules = [eqn for eqn, _ in rule_sites(problem.loss).values()]
        self.inner_stops = any(
            eqn.primitive.name == "stop_gradient"
            for rule in rules
            for body in bodies(rule)
            for eqn in equations(body)
        )
        walk = Walk(pairs=True, notes=self.notes)
        loss = problem.loss.jaxpr

        def at(
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
            here = replace(walk, hold=hold, pulls=pulls)
            closed = jax.extend.core.ClosedJaxpr(loss, consts)
            out = evaluate(closed, [*moved, *map(still, fixed)], here)[0]
            return *out.change(), out.held

        with jax.enable_x64(True):
            self._point, *self._rest = on_host(
                (
                    [wider(x) for x in problem.values],
                    problem.fixed,
                    problem.loss.consts,
                    pulls,
                )
            )
            # A direction that moves nothing in a leaf, made once.
            self._still = [jnp.zeros(x.shape, jnp.float64) for x in self._point]
        sizes = sum(int(np.prod(x.shape)) for x in problem.values) + problem.size
        self._at_once = 2 * len(LADDER) * sizes <= _TOGETHER
        self._probes = min(_TOGETHER // (2 * len(LADDER) * sizes), 8) or 1
        if self._at_once:
            steps = jax.vmap(at, (None, None, None, None, None, 0, None))
            at = jax.vmap(steps, (None, None, None, None, 0, None, 0))
        self._run = compiled(at, problem.size)
        self.ladder = LADDER
        self.here = float("nan")
        self._values([Probe(0, lambda: np.zeros(()))], [0.0], 1)  # gives `here`
        if self.notes:
            self.ladder = tuple(h * _LONGER for h in LADDER)

    def slopes(self, probes: Sequence[Probe], hold: int = 1) -> list[Slope]:
        """The derivative along each direction; `hold` as in `Walk`.

        Raises:
          OutOfBudget: it would take more evaluations than are allowed.
        """
        ladder = self.ladder
        if self._at_once:
            values = self._values(probes, [*ladder, *(-h for h in ladder), 0.0], hold)
            return [self._slope(ladder, row) for row in values]
        return [self._stepwise(probe, hold) for probe in probes]

    def _slope(self, ladder: Sequence[float], row: np.ndarray) -> Slope:
        count = len(ladder)
        changes, sizes = row
        if len(changes) > 2 * count:  # what two compiled copies of the point differ by
            changes = changes - changes[-1]
        least = _EPS * float(np.nanmax(sizes))
        quantum = _QUANTA * _EPS * abs(self.here)
        slope = slope_of(
            ladder, changes[:count], changes[count : 2 * count], least, quantum
        )
        self.rounding = max(self.rounding, slope.rounding)
        return slope

    def _stepwise(self, probe: Probe, hold: int) -> Slope:
        """The middle of the ladder first, and the rest if that doesn't agree."""
        first = self.ladder[_FIRST]
        (row,) = self._values([probe], [*first, *(-h for h in first)], hold)
        slope = self._slope(first, row)
        if slope.error <= 1e-6 * abs(slope.value) and not slope.kink:
            return slope
        rest = [h for h in self.ladder if h not in first]
        (more,) = self._values([probe], [*rest, *(-h for h in rest)], hold)
        known = dict(zip([*first, *(-h for h in first)], row.T, strict=True))
        known |= dict(zip([*rest, *(-h for h in rest)], more.T, strict=True))
        whole = [*self.ladder, *(-h for h in self.ladder)]
        return self._slope(self.ladder, np.array([known[h] for h in whole]).T)

    def _values(
        self, probes: Sequence[Probe], steps: Sequence[float], hold: int
    ) -> np.ndarray:
        count = len(probes) * len(steps)
        if self._budget is not None and self.evaluations + count > self._budget:
            raise OutOfBudget
        self.evaluations += count
        with jax.enable_x64(True):
            if not self._at_once:
                return np.array([self._row(probe, steps, hold) for probe in probes])
            width = 2 * len(LADDER) + 1
            padded = np.resize(np.array(steps, np.float64), width)
            rows: list[np.ndarray] = []
            for start in range(0, len(probes), self._probes):
                some = probes[start : start + self._probes]
                moves = [np.zeros((self._probes, *x.shape)) for x in self._still]
                for row, probe in enumerate(some):
                    moves[probe.leaf][row] = probe.direction()
                holds = np.full(self._probes, hold)
                *changes, here = self._run(
                    self._point, *self._rest, moves, padded, holds
                )
                self.here = float(here[0, 0])
                both = np.stack([np.asarray(x) for x in changes], axis=1)
                rows += list(both[: len(some), :, : len(steps)])
            return np.array(rows)

    def _row(self, probe: Probe, steps: Sequence[float], hold: int) -> np.ndarray:
        move = list(self._still)
        direction = np.broadcast_to(probe.direction(), move[probe.leaf].shape)
        move[probe.leaf] = jnp.asarray(direction)
        row = []
        for h in steps:
            *change, here = self._run(
                self._point, *self._rest, move, np.float64(h), hold
            )
            row.append([float(x) for x in change])
        self.here = float(here)
        return np.array(row).T


# Entries of a leaf whose sizes are further apart than this are displaced apart from each
# other: a step in proportion to each entry's size would show the small ones too faintly.
_DECADES = 4
DIRECTIONS = 2


def scales_of(leaf: np.ndarray) -> list[list[np.ndarray]]:
    """Groups of a leaf's entries, of about one size, each with the scales to try.

    A step is in proportion to each entry's size, since that is the best guess at the
    scale on which the loss changes; for a zero, and for what is tiny beside the rest,
    the leaf's typical size is tried too.
    """
    size = np.abs(leaf)
    largest = size.max(initial=0.0)
    if largest == 0:
        return [[np.ones_like(size)]]
    typical = float(np.sqrt(np.mean(size[size > 0] ** 2)))
    with np.errstate(divide="ignore"):
        decade = np.floor((np.log10(largest) - np.log10(size)) / _DECADES)
    groups = []
    for number in np.unique(decade):
        mask = decade == number
        own = np.where(mask, size, 0.0)
        if number == 0:
            groups.append([own])
        elif np.isinf(number):
            both = [typical] if 0.1 < typical < 10 else [typical, 1.0]
            groups.append([mask * scale for scale in both])
        else:
            groups.append([own, mask * typical])
    return groups


def random_direction(
    scale: np.ndarray, seed: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    """A direction of random signs and sizes, in proportion to a scale."""
    return lambda: spread(np.random.default_rng(seed), scale.shape) * scale
