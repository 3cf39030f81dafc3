"""The verdict on each leaf: the claimed gradient against the loss's values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.causes import find_cause
from jaxgrad.checking.locating import locate
from jaxgrad.checking.problem import Problem
from jaxgrad.checking.reference import (
    OutOfBudget,
    Probe,
    Reference,
    random_direction,
    scales_of,
)
from jaxgrad.checking.report import EntryCheck, LeafCheck
from jaxgrad.differences import Slope

# In float64 a rule's own rounding is far below this share of its size, and so it is
# worth a closer look only beyond.
_ROUNDING = 1e-10
# The slopes' errors are brought below this share, if they can: one wrong entry of its
# own size among ten million is 3e-4 of a leaf's gradient.
_FINE = 1e-6
# An error of the share r of a gradient shows along a random direction as r times a
# normal number: below this share of r = 1e-4 in one case of 10,000. Where the slope's
# error is larger, two directions are needed to see it as surely.
_SURE = 1e-8
# The slope of what doesn't change is zero, give or take this share of the loss: a
# thousand roundings of it over a step of 1e-4.
_FAINT = 1e-8
# Up to here each entry of a leaf is measured, in a few batches.
_SMALL_LEAF = 64
_SHOWN = 16


class Claim(NamedTuple):
    """A gradient to be judged.

    Attributes:
      tested: in float64, one array per leaf: what is judged.
      noise: how far rounding takes each entry of it; 0 if it was computed in float64.
      native: what the user gets; `None` where that is what is tested.
      nudged: makes what is tested again, with the parameters moved by about a hundred
        roundings; `None` where it wasn't computed in float64.
    """

    tested: list[np.ndarray]
    noise: list[np.ndarray | float]
    native: list[np.ndarray] | None
    nudged: Callable[[], list[np.ndarray]] | None


class Measured(NamedTuple):
    """A direction in a leaf: its slope by values, and by the claimed gradient."""

    direction: Callable[[], np.ndarray]
    slope: Slope
    claimed: float
    norm: float
    noise: float
    length: float
    free: Slope | None = None

    @property
    def gap(self) -> float:
        """How much the two differ by."""
        return abs(self.claimed - self.slope.value)

    @property
    def agrees(self) -> bool:
        """Whether they do, to what the reference and rounding leave open."""
        return self.gap <= self.slope.error + self.noise + _ROUNDING * self.norm

    @property
    def goal(self) -> float:
        """The error below which the slope need not be any better."""
        return _FINE * self.norm

    @property
    def settled(self) -> bool:
        """Whether the two agree so closely that another direction would say no more."""
        sharp = self.slope.error <= _SURE * self.norm
        return self.agrees and not self.slope.kink and sharp

    @property
    def between(self) -> bool:
        """On a kink: whether the claim lies between the one-sided slopes."""
        return within(self.claimed, self.slope, self.noise + 1e-6 * self.norm)


def within(claimed: float, slope: Slope, slack: float) -> bool:
    """Whether a number lies between the one-sided slopes, or nearly so."""
    low, high = sorted((slope.ahead, slope.behind))
    slack += slope.error + 1e-6 * (high - low)
    return bool(low - slack <= claimed <= high + slack)


@dataclass(frozen=True)
class Judge:
    """Judges the leaves of one problem.

    Attributes:
      problem: what is checked.
      reference: the loss's values.
      claim: the gradient.
      rtol: how far off a gradient may be, relative to its size.
      candidates: makes gradients that may be right where the claim is not: they are
        believed only if the loss's values bear them out.
      counts: sizes that a factor may come from, by name.
      parts: makes the parts of a leaf's gradient, one per term of the loss.
      seed: chooses the random directions.
      hold: where a `stop_gradient` is one, as in `Walk`.
    """

    problem: Problem
    reference: Reference
    claim: Claim
    rtol: float
    candidates: Callable[[], list[list[np.ndarray]]]
    counts: dict[str, int]
    parts: Callable[[int], Sequence[tuple[str, np.ndarray]]]
    seed: int = 0
    hold: int = 1
    _known: dict[int, list[Measured]] = field(default_factory=dict)

    def leaves(self) -> list[LeafCheck]:
        """The verdict on each leaf."""
        numbers = range(len(self.problem.names))
        with contextlib.suppress(OutOfBudget):  # then leaf by leaf, while it lasts
            self._known.update(self._measure(list(numbers)))
        return [self.leaf(number) for number in numbers]

    def leaf(self, number: int) -> LeafCheck:
        """The verdict on one leaf."""
        value = self.problem.values[number]
        row = LeafCheck(
            self.problem.names[number], tuple(value.shape), str(value.dtype), "right"
        )
        claimed = self.claim.tested[number]
        native = self.claim.native[number] if self.claim.native else claimed
        try:
            if not np.isfinite(native).all():
                return self._nonfinite(row, number, native)
            if not np.isfinite(self.reference.here):
                return replace(
                    row,
                    verdict="undecided",
                    text=f"the loss is {self.reference.here} at this point",
                )
            if not np.isfinite(claimed).all():
                return replace(
                    row,
                    verdict="undecided",
                    text="the gradient is finite in its own dtype, and not in float64",
                )
            if claimed.size == 0:
                return replace(row, relative_error=0.0)
            return self._finite(row, number, claimed, native)
        except OutOfBudget:
            return replace(
                row,
                verdict="undecided",
                text=f"max_evaluations is too small: {self.reference.evaluations} "
                "evaluations of the loss were not enough",
            )

    def _nonfinite(self, row: LeafCheck, number: int, native: np.ndarray) -> LeafCheck:
        bad = np.flatnonzero(~np.isfinite(native))
        entries: tuple[EntryCheck, ...] = ()
        if np.isfinite(self.reference.here):
            slopes = self.entries(number, bad[:_SHOWN])
            entries = self._rows(native, bad[:_SHOWN], slopes)
        wide = self.claim.tested[number]
        why = ""
        if self.claim.native and np.isfinite(wide).all():
            why = f": {row.dtype} overflows, float64 doesn't"
        return replace(
            row,
            verdict="nonfinite",
            entries=entries,
            wrong_entries=len(bad),
            text=f"{len(bad)} of {native.size} entries aren't finite{why}",
        )

    def _finite(
        self, row: LeafCheck, number: int, claimed: np.ndarray, native: np.ndarray
    ) -> LeafCheck:
        if number not in self._known:
            self._known.update(self._measure([number]))
        measured = self._known[number]
        row = replace(row, held=self._held(measured))
        kinks = [m for m in measured if m.slope.kink]
        if all(m.agrees for m in measured) and not kinks:
            if self._unseen(claimed, measured) and all(
                self._nothing(number, m) for m in measured
            ):
                return replace(row, relative_error=0.0, text="zero, up to rounding")
            row = self._agreeing(row, claimed, measured)
        else:
            row = self._either(row, number, claimed, measured)
        return self._digits(row, number, native, claimed)

    def _either(
        self, row: LeafCheck, number: int, claimed: np.ndarray, measured: list[Measured]
    ) -> LeafCheck:
        """Whether a `stop_gradient` in a rule's forward part holds or not is open.

        By the rule it needn't; without the rule it would. Either gradient is right, and
        a wrong one is told by the one that's nearer.
        """
        if not self.reference.inner_stops:
            return self._doubtful(row, number, claimed, measured)
        probes = [Probe(number, m.direction) for m in measured]
        slopes = self.reference.slopes(probes, hold=2)
        held = [
            compared(m.direction, s, claimed, self.claim.noise[number])
            for m, s in zip(measured, slopes, strict=True)
        ]
        if sum(m.gap for m in held) >= sum(m.gap for m in measured):
            return self._doubtful(row, number, claimed, measured)
        judge = replace(self, hold=2)
        row = replace(row, held="stopped")
        if all(m.agrees for m in held) and not any(m.slope.kink for m in held):
            return judge._agreeing(row, claimed, held)
        return judge._doubtful(row, number, claimed, held)

    def _measure(self, numbers: Sequence[int]) -> dict[int, list[Measured]]:
        """Leaves along random directions, entries of one size at a time."""
        groups: dict[tuple[int, int], list[np.ndarray]] = {}
        for number in numbers:
            value = np.asarray(self.problem.values[number]).astype(np.float64)
            for place, options in enumerate(scales_of(value) if value.size else []):
                groups[number, place] = options
        best = self._along({key: options[0] for key, options in groups.items()}, 0)
        again = {
            key: groups[key][0]
            for key, (measured,) in best.items()
            if not measured.settled and np.count_nonzero(groups[key][0]) > 1
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
            free = self.reference.slopes(probes, [m.goal for _, m in first], hold=0)
            for (key, m), slope in zip(first, free, strict=True):
                best[key][0] = m._replace(free=slope)
        measured = {number: [] for number in numbers}
        for (number, _), found in best.items():
            measured[number] += found
        return measured

    def _along(
        self, scales: dict[tuple[int, int], np.ndarray], turn: int
    ) -> dict[tuple[int, int], list[Measured]]:
        """Along one random direction for each scale, by leaf and group."""
        probes, goals = [], []
        for (number, place), scale in scales.items():
            direction = random_direction(scale, (self.seed, number, place, turn))
            parts = self.claim.tested[number] * direction()
            probes.append(Probe(number, direction))
            goals.append(_FINE * float(np.linalg.norm(parts)))
        measured = {}
        slopes = self.reference.slopes(probes, goals)
        for key, probe, slope in zip(scales, probes, slopes, strict=True):
            claimed, noise = self.claim.tested[key[0]], self.claim.noise[key[0]]
            measured[key] = [compared(probe.direction, slope, claimed, noise)]
        return measured

    def _held(self, measured: list[Measured]) -> str:
        for m in measured:
            if m.free is None:
                continue
            gap = abs(m.free.value - m.slope.value)
            # Beyond a hundred-thousandth of the gradient; less is a softmax's shift.
            if gap > 3 * (m.free.error + m.slope.error) + 1e-5 * m.norm:
                return "trusted" if self.problem.taps else "stopped"
        return ""

    def _unseen(self, claimed: np.ndarray, measured: list[Measured]) -> Measured | None:
        """The slope, if any, that would not show an error of `rtol`."""
        allowed = self.rtol * np.linalg.norm(claimed)
        # Of an error that's spread like the direction.
        coarse = [m for m in measured if not m.slope.error / m.length <= allowed]
        return max(coarse, key=lambda m: m.slope.error / m.length, default=None)

    def _agreeing(
        self, row: LeafCheck, claimed: np.ndarray, measured: list[Measured]
    ) -> LeafCheck:
        relative = max(_ratio(m.gap, m.norm) for m in measured)
        m = self._unseen(claimed, measured)
        if m is None:
            return replace(row, relative_error=relative)
        return replace(
            row,
            verdict="undecided",
            relative_error=relative,
            text=f"the loss's values give the slope along a direction as "
            f"{m.slope.value:.4g} give or take {m.slope.error:.2g}, which is too coarse "
            f"for rtol={self.rtol:g} (the gradient says {m.claimed:.4g})",
        )

    def _nothing(self, number: int, m: Measured) -> bool:
        """Whether a gradient is zero up to rounding, and so the loss's values say.

        Such as that of a bias before a batch norm. Moved by a hundred roundings, a
        gradient that is nothing but rounding becomes another; a small one stays. One so
        small that the loss would not change by a rounding is zero for all that shows.
        """
        scale = self.reference.scale
        if abs(m.slope.value) > m.slope.error or m.slope.error > _FAINT * scale:
            return False
        claimed = self.claim.tested[number]
        if m.norm <= max(m.noise, np.finfo(np.float64).eps * scale):
            return True
        if self.claim.nudged is None:
            return False
        change = claimed - self.claim.nudged()[number]
        return bool(np.linalg.norm(claimed) <= 10 * np.linalg.norm(change))

    def _doubtful(
        self, row: LeafCheck, number: int, claimed: np.ndarray, measured: list[Measured]
    ) -> LeafCheck:
        if claimed.size <= _SMALL_LEAF:
            places = np.arange(claimed.size)
            return self._entrywise(row, number, claimed, places, None)
        right = self._borne_out(number, measured)
        if right is None:
            return self._searched(row, number, claimed, measured)
        suspects = self._suspects(number, claimed, right)
        if not len(suspects):
            kinks = [m.slope for m in measured if m.slope.kink]
            if kinks:
                return _on_kink(row, kinks[0])
            error = _ratio(np.linalg.norm(claimed - right), np.linalg.norm(right))
            return replace(row, relative_error=error)
        return self._entrywise(row, number, claimed, suspects[:_SHOWN], right, suspects)

    def _borne_out(self, number: int, measured: list[Measured]) -> np.ndarray | None:
        """A candidate that agrees with all that was measured."""
        for candidate in self.candidates():
            array = candidate[number]
            again = [compared(m.direction, m.slope, array, 0.0) for m in measured]
            if np.isfinite(array).all() and all(
                m.between if m.slope.kink else m.agrees for m in again
            ):
                return array
        return None

    def _suspects(
        self, number: int, claimed: np.ndarray, right: np.ndarray
    ) -> np.ndarray:
        """The entries that differ, the worst first, if they matter."""
        noise = np.broadcast_to(self.claim.noise[number], claimed.shape)
        error = np.abs(claimed - right)
        beyond = error - self._allowance(error, right, noise)
        order = np.argsort(-beyond.ravel())
        return order[: np.count_nonzero(beyond > 0)]

    def _allowance(
        self, error: np.ndarray, right: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        """What an entry may be off by: `rtol` of itself, and its share of noise.

        Noise is spread over the leaf. The quarter of the entries with the least error
        shows its size: in a normal distribution 30 times their bound is beyond the
        largest of a million. One wrong entry stands out of it.
        """
        typical = np.sort(error, axis=None)[(error.size - 1) // 4]
        rms = np.sqrt(np.mean(right**2))
        spread = 30 * typical if error.size > 1 else 0.0
        bound = self.rtol * np.abs(right) + spread + 10 * _ROUNDING * rms + noise
        return np.asarray(bound)

    def entries(self, number: int, places: Sequence[int]) -> list[Slope]:
        """The derivative with respect to single entries."""
        value = np.asarray(self.problem.values[number]).astype(np.float64)
        flat = np.abs(value).ravel()
        typical = float(np.sqrt(np.mean(flat**2))) or 1.0

        def maker(place: int, scale: float) -> Callable[[], np.ndarray]:
            def direction() -> np.ndarray:
                one = np.zeros(value.size)
                one[place] = scale
                return one.reshape(value.shape)

            return direction

        chosen = [int(p) for p in places]
        scales = [float(flat[p]) or typical for p in chosen]
        slopes = self._scaled(number, chosen, scales, maker)
        tiny = [k for k, s in enumerate(scales) if s < 1e-3 * typical]
        if tiny:
            again = self._scaled(
                number, [chosen[k] for k in tiny], [typical] * len(tiny), maker
            )
            for k, slope in zip(tiny, again, strict=True):
                # A longer step says more, and may step over all that there is.
                gap = abs(slope.value - slopes[k].value)
                if gap <= slope.error + slopes[k].error < 2 * slopes[k].error:
                    slopes[k] = slope
        return slopes

    def _scaled(
        self, number: int, places: list[int], scales: list[float], maker: Any
    ) -> list[Slope]:
        pairs = list(zip(places, scales, strict=True))
        probes = [Probe(number, maker(p, s)) for p, s in pairs]
        slopes = self.reference.slopes(probes, hold=self.hold)
        return [
            Slope(
                slope.value / s,
                slope.error / s,
                slope.ahead / s,
                slope.behind / s,
                slope.kink,
            )
            for slope, (_, s) in zip(slopes, pairs, strict=True)
        ]

    def _rows(
        self, claimed: np.ndarray, places: Sequence[int], slopes: Sequence[Slope]
    ) -> tuple[EntryCheck, ...]:
        return tuple(
            EntryCheck(
                tuple(int(i) for i in np.unravel_index(place, claimed.shape)),
                float(claimed.flat[place]),
                slope.value,
                slope.error,
            )
            for place, slope in zip(places, slopes, strict=True)
        )

    def _entrywise(
        self,
        row: LeafCheck,
        number: int,
        claimed: np.ndarray,
        places: np.ndarray,
        right: np.ndarray | None,
        suspects: np.ndarray | None = None,
    ) -> LeafCheck:
        """The verdict by single entries: all of them, or the worst of a candidate's."""
        slopes = self.entries(number, places)
        noise = np.broadcast_to(self.claim.noise[number], claimed.shape).ravel()[places]
        said = claimed.ravel()[places]
        value = np.array([s.value for s in slopes])
        bars = np.array([s.error for s in slopes])
        value = np.where(np.isfinite(bars), value, said)  # the bar says it's unknown
        kinks = np.array([s.kink for s in slopes])
        between = np.array(
            [within(c, s, n) for c, s, n in zip(said, slopes, noise, strict=True)]
        )
        settled = kinks & between
        value = np.where(settled, said, value)  # any number between is a right one
        error = np.abs(said - value)
        if right is None:
            right = value.reshape(claimed.shape)
            allowed = self._allowance(error, value, noise)
        else:
            allowed = self.rtol * np.abs(value) + noise
        wrong = (error > allowed + bars) & ~settled
        size = np.linalg.norm(right)
        whole = claimed - right
        relative = _ratio(np.linalg.norm(whole), size)
        bar = np.linalg.norm(bars[~settled]) + np.linalg.norm(noise)
        complete = suspects is None
        if complete and not wrong.any():
            # Many entries that are a little off, each less than its bar.
            if np.linalg.norm(whole) > self.rtol * size + bar:
                wrong = (error > bars + noise + self.rtol * np.abs(value)) & ~settled
            elif not bars[~settled].max(initial=0.0) <= max(
                self.rtol * size, (size == 0) * _FAINT * self.reference.scale
            ):
                return replace(
                    row,
                    verdict="undecided",
                    relative_error=relative,
                    text="the loss's values give single entries only to within "
                    f"{bars[~settled].max():.2g}",
                )
        order = np.argsort(-(error - allowed - bars) * ~settled)
        if wrong.any():
            count = int(np.count_nonzero(wrong)) if suspects is None else len(suspects)
            shown = [k for k in order if wrong[k]][:_SHOWN]
            if suspects is not None and not wrong[0]:
                return self._unclear(row, relative)
            return replace(
                row,
                verdict="wrong",
                relative_error=relative,
                wrong_entries=count,
                entries=self._rows(claimed, places[shown], [slopes[k] for k in shown]),
                cause=self._cause(number, claimed, right, bar),
            )
        if settled.any():
            first = int(np.flatnonzero(settled)[0])
            rows = self._rows(
                claimed,
                places[settled][:_SHOWN],
                [s for s, on in zip(slopes, settled, strict=True) if on][:_SHOWN],
            )
            row = _on_kink(row, slopes[first])
            return replace(row, relative_error=relative, entries=rows)
        if suspects is not None and relative > self.rtol:
            return self._unclear(row, relative)
        return replace(row, relative_error=relative)

    def _unclear(self, row: LeafCheck, relative: float) -> LeafCheck:
        return replace(
            row,
            verdict="undecided",
            relative_error=relative,
            text="the gradient differs from the loss's values along random directions, "
            "and single entries don't show where",
        )

    def _searched(
        self, row: LeafCheck, number: int, claimed: np.ndarray, measured: list[Measured]
    ) -> LeafCheck:
        """The verdict by halving a leaf that no candidate explains."""
        kinks = [m for m in measured if m.slope.kink]
        doubtful = [
            m for m in measured if not (m.between if m.slope.kink else m.agrees)
        ]
        if not doubtful:
            return _on_kink(row, kinks[0].slope)
        worst = max(doubtful, key=lambda m: m.gap / (m.norm or 1))
        found = locate(
            lambda probes: self.reference.slopes(probes, hold=self.hold),
            number,
            claimed,
            worst.direction(),
            _ROUNDING,
        )
        relative = max(_ratio(m.gap, m.norm or abs(m.slope.value)) for m in doubtful)
        if found.spread:
            bars = [(m.slope.error + m.noise) / (m.norm or 1) for m in doubtful]
            if relative <= self.rtol + max(bars):
                return replace(row, relative_error=relative)
        places = np.array(found.places[: 4 * _SHOWN], int)
        right = (
            np.full(claimed.size, np.nan) if found.spread else claimed.ravel().copy()
        )
        slopes = self.entries(number, places)
        right[places] = [s.value for s in slopes]
        bars_ = np.array([s.error for s in slopes])
        noise = np.broadcast_to(self.claim.noise[number], claimed.shape).ravel()[places]
        error = np.abs(claimed.ravel()[places] - right[places])
        settled = np.array(
            [
                s.kink and within(float(claimed.flat[p]), s, n)
                for s, p, n in zip(slopes, places, noise, strict=True)
            ],
            bool,
        )
        wrong = (error > bars_ + noise + self.rtol * np.abs(right[places])) & ~settled
        if not wrong.any():
            if settled.any():
                return _on_kink(row, slopes[int(np.flatnonzero(settled)[0])])
            return self._unclear(row, relative) if relative > self.rtol else row
        order = [k for k in np.argsort(-error) if wrong[k]]
        return replace(
            row,
            verdict="wrong",
            relative_error=relative,
            wrong_entries=None if found.spread else int(np.count_nonzero(wrong)),
            entries=self._rows(
                claimed, places[order[:_SHOWN]], [slopes[k] for k in order[:_SHOWN]]
            ),
            cause=self._cause(
                number, claimed, right.reshape(claimed.shape), float(bars_.max())
            ),
        )

    def _cause(
        self, number: int, claimed: np.ndarray, right: np.ndarray, bar: float
    ) -> Any:
        others = {
            name: tested
            for k, (name, tested) in enumerate(
                zip(self.problem.names, self.claim.tested, strict=True)
            )
            if k != number and tested.shape == claimed.shape
        }
        known = np.isfinite(right)
        size = np.linalg.norm(right[known])
        gap = np.linalg.norm((claimed - right)[known])
        noise = min(bar, gap / 10) / size if size else 0.0
        return find_cause(
            self.problem.names[number],
            claimed,
            right,
            counts=self.counts,
            other_claimed=others,
            contributions=lambda: self.parts(number),
            noise=max(1e-9, float(noise)),
        )

    def _digits(
        self, row: LeafCheck, number: int, native: np.ndarray, claimed: np.ndarray
    ) -> LeafCheck:
        if not self.claim.native:
            return row
        eps = float(jnp.finfo(row.dtype).eps)
        error = _ratio(np.linalg.norm(native - claimed), np.linalg.norm(claimed))
        digits = min(-np.log10(max(error, 1e-17)), -np.log10(eps) + 1)
        if row.verdict == "wrong" and row.relative_error:
            digits = min(digits, -np.log10(row.relative_error))
        row = replace(row, digits=float(max(digits, 0.0)))
        if row.verdict == "right" and error > eps**0.5:
            text = (
                f"{max(digits, 0):.1f} of {-np.log10(eps):.1f} decimal digits are left "
                f"in {row.dtype}"
            )
            return replace(row, verdict="imprecise", text=text)
        return row


def compared(
    direction: Callable[[], np.ndarray],
    slope: Slope,
    claimed: np.ndarray,
    noise: np.ndarray | float,
) -> Measured:
    """A slope beside what a claimed gradient says of it."""
    move = direction()
    parts = claimed * move
    return Measured(
        direction,
        slope,
        float(parts.sum()),
        float(np.linalg.norm(parts)),
        float(np.linalg.norm(np.asarray(noise * move))),
        float(np.sqrt(np.mean(move[move != 0] ** 2))),
    )


def _better(own: list[Measured], other: list[Measured]) -> list[Measured]:
    """Of two scales the one that says more, if it doesn't contradict the other.

    A longer step says more, and may step over all that there is.
    """
    agree = all(m.agrees for m in own) == all(m.agrees for m in other)
    return other if agree and _bar(other) < _bar(own) else own


def _bar(measured: list[Measured]) -> float:
    return max(m.slope.error / m.length for m in measured)


def _ratio(error: Any, size: Any) -> float:
    if error == 0:
        return 0.0
    return float(error / size) if size else float("inf")


def _on_kink(row: LeafCheck, slope: Slope) -> LeafCheck:
    low, high = sorted((slope.ahead, slope.behind))
    return replace(
        row,
        verdict="kink",
        one_sided=(low, high),
        text="the loss has a kink here: its one-sided derivatives are "
        f"{low:.6g} and {high:.6g}, and the gradient lies between them",
    )
