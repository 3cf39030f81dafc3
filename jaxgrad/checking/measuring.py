"""Slopes of a loss along directions in a leaf and in single entries, beside a claim."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxgrad.checking.leaves import Leaf, as_numpy, leaf_of, on_mesh, single, values_at
from jaxgrad.checking.problem import Problem
from jaxgrad.checking.reference import Probe, Reference
from jaxgrad.checking.scales import Scale, random_direction, scales_of
from jaxgrad.checking.sums import moving, product, root_mean_square
from jaxgrad.differences import Slope

# In float64 a rule's own rounding is far below this share of its size, and so it is
# worth a closer look only beyond.
ROUNDING = 1e-10
# The slopes' errors are brought below this share, if they can: one wrong entry of its
# own size among ten million is 3e-4 of a leaf's gradient.
_FINE = 1e-6
# An error of the share r of a gradient shows along a random direction as r times a
# normal number: below this share of r = 1e-4 in one case of 10,000. Where the slope's
# error is larger, two directions are needed to see it as surely.
_SURE = 1e-8


class Claim(NamedTuple):
    """A gradient to be judged.

    Attributes:
      tested: in float64, one array per leaf: what is judged.
      noise: how far rounding takes each entry of it; 0 if it was computed in float64.
      native: what the user gets; `None` where that is what is tested.
      nudged: makes what is tested again, with the parameters moved by some fifty
        roundings; `None` where it wasn't computed in float64.
    """

    tested: list[Leaf]
    noise: list[Leaf | float]
    native: list[Leaf] | None
    nudged: Callable[[], list[Leaf]] | None


class Measured(NamedTuple):
    """A direction in a leaf: its slope by values, and by the claimed gradient.

    Attributes:
      direction: makes it.
      slope: from the loss's values.
      claimed: what the claimed gradient says that it is.
      norm: the 2-norm of the parts that the entries have in that.
      noise: what rounding in the claim explains.
      length: how far its entries go, on average (root mean square).
      moving: how many go.
      free: the slope with nothing held by a `stop_gradient` or a trusted rule.
    """

    direction: Callable[[], Leaf]
    slope: Slope
    claimed: float
    norm: float
    noise: float
    length: float
    moving: int
    free: Slope | None = None

    @property
    def gap(self) -> float:
        """How much the two differ by."""
        return abs(self.claimed - self.slope.value)

    @property
    def agrees(self) -> bool:
        """Whether they do, to what the reference and rounding leave open."""
        return self.gap <= self.slope.error + self.noise + ROUNDING * self.norm

    @property
    def goal(self) -> float:
        """The error below which the slope need not be any better."""
        return _FINE * self.norm

    @property
    def open(self) -> bool:
        """Whether some steps bear the claim out, though others contradict them."""
        return is_open(self.claimed, self.slope, self.noise)

    @property
    def settled(self) -> bool:
        """Whether the two agree so closely that another direction would say no more."""
        sharp = self.slope.error <= _SURE * self.norm
        return self.agrees and not self.slope.kink and sharp

    def allowed(self, rtol: float) -> bool:
        """Whether the two differ by no more than a right gradient may."""
        return self.gap <= rtol * self.norm + self.slope.error + self.noise

    @property
    def between(self) -> bool:
        """On a kink: whether the claim lies between the one-sided slopes."""
        return within(self.claimed, self.slope, self.noise + 1e-6 * self.norm)


def within(claimed: float, slope: Slope, slack: float) -> bool:
    """Whether a number lies between the one-sided slopes, or nearly so."""
    low, high = sorted((slope.ahead, slope.behind))
    slack += slope.error + 1e-6 * (high - low)
    return bool(low - slack <= claimed <= high + slack)


def is_open(claimed: float, slope: Slope, noise: float) -> bool:
    """Whether a claim is what some steps say, though others contradict them."""
    return any(abs(claimed - value) <= error + noise for value, error in slope.others)


def compared(
    direction: Callable[[], Leaf],
    slope: Slope,
    claimed: Leaf,
    noise: Leaf | float,
) -> Measured:
    """A slope beside what a claimed gradient says of it."""
    move = direction()
    said, size = map(float, product(claimed, move))
    length, count = moving(move)
    return Measured(
        direction,
        slope,
        said,
        size,
        0.0 if isinstance(noise, float) else float(product(noise, move)[1]),
        float(length / np.sqrt(max(int(count), 1))),
        int(count),
    )


def _better(own: list[Measured], other: list[Measured]) -> list[Measured]:
    """Of two scales the one that says more, if it doesn't contradict the other.

    A longer step says more, and may step over all that there is.
    """
    agree = all(m.agrees for m in own) == all(m.agrees for m in other)
    return other if agree and _bar(other) < _bar(own) else own


def _bar(measured: list[Measured]) -> float:
    return max(m.slope.error / m.length for m in measured)


@dataclass(frozen=True)
class Measuring:
    """Measures a loss's slopes, leaf by leaf.

    Attributes:
      problem: the loss.
      reference: its values.
      claim: the gradient that is compared with them.
      seed: chooses the random directions.
      hold: where a `stop_gradient` is one, as in `Walk`.
    """

    problem: Problem
    reference: Reference
    claim: Claim
    seed: int
    hold: int = 1

    def value(self, number: int) -> Leaf:
        """A leaf, in float64."""
        value = self.problem.values[number]
        if on_mesh(value):
            return leaf_of(self.reference.point[number], value)
        return as_numpy(value)

    def directions(self, numbers: Sequence[int]) -> dict[int, list[Measured]]:
        """Leaves along random directions, entries of one size at a time."""
        groups: dict[tuple[int, int], list[Scale]] = {}
        for number in numbers:
            if not self.problem.values[number].size:
                continue
            leaf = functools.partial(self.value, number)
            for place, options in enumerate(scales_of(leaf)):
                groups[number, place] = options
        best = self._along({key: options[0] for key, options in groups.items()}, 0)
        again = {
            key: groups[key][0]
            for key, (measured,) in best.items()
            if not measured.settled and measured.moving > 1
        }
        for key, second in self._along(again, 1).items():
            best[key] += second
        # Where a group's own size says little, the leaf's typical one may say more.
        faint = {
            key: groups[key][1]
            for key, measured in best.items()
            if len(groups[key]) > 1 and not all(m.settled for m in measured)
        }
        for key, other in self._along(faint, 0).items():
            best[key] = _better(best[key], other)
        if self.reference.stops:
            first = [(key, best[key][0]) for key in best if key[1] == 0]
            probes = [Probe(number, m.direction) for (number, _), m in first]
            goals = [3 * m.goal for _, m in first]  # it's but to see if they differ
            free = self.reference.slopes(probes, goals, hold=0)
            for (key, m), slope in zip(first, free, strict=True):
                best[key][0] = m._replace(free=slope)
        measured: dict[int, list[Measured]] = {number: [] for number in numbers}
        for (number, _), found in best.items():
            measured[number] += found
        return measured

    def _along(
        self, scales: dict[tuple[int, int], Scale], turn: int
    ) -> dict[tuple[int, int], list[Measured]]:
        """Along one random direction for each scale, by leaf and group."""
        probes, goals = [], []
        for (number, place), scale in scales.items():
            direction = random_direction(scale, (self.seed, number, place, turn))
            size = product(self.claim.tested[number], direction())[1]
            probes.append(Probe(number, direction))
            goals.append(_FINE * float(size))
        measured: dict[tuple[int, int], list[Measured]] = {}
        slopes = self.reference.slopes(probes, goals)
        for key, probe, slope in zip(scales, probes, slopes, strict=True):
            claimed, noise = self.claim.tested[key[0]], self.claim.noise[key[0]]
            measured[key] = [compared(probe.direction, slope, claimed, noise)]
        return measured

    def again(self, number: int, measured: Sequence[Measured]) -> list[Measured]:
        """The same directions, with this `hold`."""
        probes = [Probe(number, m.direction) for m in measured]
        slopes = self.reference.slopes(probes, hold=self.hold)
        claimed, noise = self.claim.tested[number], self.claim.noise[number]
        return [
            compared(m.direction, slope, claimed, noise)
            for m, slope in zip(measured, slopes, strict=True)
        ]

    def entries(self, number: int, places: np.ndarray) -> list[Slope]:
        """The derivative with respect to single entries."""
        value = self.value(number)
        typical = float(root_mean_square(value)) or 1.0

        def along(places: list[int], scales: list[float]) -> list[Slope]:
            pairs = list(zip(places, scales, strict=True))
            probes = [
                Probe(number, functools.partial(single, value, *pair)) for pair in pairs
            ]
            slopes = self.reference.slopes(probes, hold=self.hold)
            return [slope.over(s) for slope, s in zip(slopes, scales, strict=True)]

        chosen = [int(place) for place in places]
        sizes = np.abs(values_at(value, np.array(chosen, int)))
        scales = [float(size) or typical for size in sizes]
        slopes = along(chosen, scales)
        tiny = [k for k, scale in enumerate(scales) if scale < 1e-3 * typical]
        again = along([chosen[k] for k in tiny], [typical] * len(tiny))
        for k, slope in zip(tiny, again, strict=True):
            # A longer step says more, and may step over all that there is.
            gap = abs(slope.value - slopes[k].value)
            if gap <= slope.error + slopes[k].error < 2 * slopes[k].error:
                slopes[k] = slope
        return slopes
