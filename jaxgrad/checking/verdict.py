"""The verdict on each leaf: the claimed gradient against the loss's values."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.checking.blaming import Wrong, blame
from jaxgrad.checking.entries import (
    Suspects,
    allowed_at,
    beyond,
    known_sizes,
    nonfinite,
)
from jaxgrad.checking.leaves import (
    SMALL_LEAF,
    Leaf,
    filled,
    values_at,
    with_values,
)
from jaxgrad.checking.locating import locate
from jaxgrad.checking.measuring import (
    Measured,
    Measuring,
    compared,
    is_open,
    within,
)
from jaxgrad.checking.problem import epsilon
from jaxgrad.checking.reference import OutOfBudget
from jaxgrad.checking.report import EntryCheck, LeafCheck
from jaxgrad.checking.sums import (
    any_nonzero,
    change_along,
    gap_of,
    is_finite,
    size_of,
    wide,
)
from jaxgrad.differences import Slope

# The slope of what doesn't change is zero, give or take this share of the loss: a
# thousand roundings of it over a step of 1e-4.
_FAINT = 1e-8
_SHOWN = 16
# Along a random direction an error shows as up to so many times its share of a
# gradient's norm, in all but one case of 400.
_CHANCE = 3


@dataclass(frozen=True)
class Judge:
    """Judges the leaves of one problem.

    Attributes:
      measuring: takes the slopes.
      rtol: how far off a gradient may be, relative to its size.
      candidates: makes gradients that may be right where the claim is not: they are
        believed only if the loss's values bear them out.
      counts: sizes that a factor may come from, by name.
      parts: makes the parts of a leaf's gradient, one per term of the loss.
    """

    measuring: Measuring
    rtol: float
    candidates: Callable[[], list[list[Leaf]]]
    counts: dict[str, int]
    parts: Callable[[int], Sequence[tuple[str, np.ndarray]]]
    _known: dict[int, list[Measured]] = field(default_factory=dict)

    def leaves(self) -> list[LeafCheck]:
        """The verdict on each leaf."""
        numbers = range(len(self.measuring.problem.names))
        with contextlib.suppress(OutOfBudget):  # then leaf by leaf, while it lasts
            self._known.update(self.measuring.directions(list(numbers)))
        return [self.leaf(number) for number in numbers]

    def leaf(self, number: int) -> LeafCheck:
        """The verdict on one leaf."""
        value = self.measuring.problem.values[number]
        row = LeafCheck(
            self.measuring.problem.names[number],
            tuple(value.shape),
            str(value.dtype),
            "right",
        )
        claimed = self.measuring.claim.tested[number]
        own = self.measuring.claim.native
        native = wide(own[number]) if own else claimed
        try:
            if not is_finite(native):
                return self._nonfinite(row, number, native)
            here = self.measuring.reference.here
            if not np.isfinite(here) and self.measuring.reference.evaluations:
                return replace(
                    row,
                    verdict="undecided",
                    text=f"the loss is {here} at this point",
                )
            if not is_finite(claimed):
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
                text="max_evaluations is too small: "
                f"{self.measuring.reference.evaluations} evaluations of the loss were "
                "not enough",
            )

    def _nonfinite(self, row: LeafCheck, number: int, native: Leaf) -> LeafCheck:
        count, places = nonfinite(native, most=_SHOWN)
        count, places = int(count), places[: int(count)]
        entries: tuple[EntryCheck, ...] = ()
        if np.isfinite(self.measuring.reference.here):
            slopes = self.measuring.entries(number, places)
            entries = self._rows(native, places, slopes)
        tested = self.measuring.claim.tested[number]
        why = ""
        if self.measuring.claim.native and is_finite(tested):
            why = f": {row.dtype} overflows, float64 doesn't"
        return replace(
            row,
            verdict="nonfinite",
            entries=entries,
            wrong_entries=count,
            text=f"{count} of {native.size} entries aren't finite{why}",
        )

    def _finite(
        self, row: LeafCheck, number: int, claimed: Leaf, native: Leaf
    ) -> LeafCheck:
        if number not in self._known:
            self._known.update(self.measuring.directions([number]))
        measured = self._known[number]
        row = replace(row, held=self._held(measured))
        agree = _agree(measured)
        unseen = agree and self._unseen(claimed, measured)
        if unseen and all(self._nothing(number, m) for m in measured):
            return replace(row, relative_error=0.0, text="zero, up to rounding")
        if (unseen or not agree) and self._by_rounding(number, measured, agree):
            text = "right, as far as the rounding of float64 lets it be told"
            return replace(row, text=text)
        if agree:
            row = self._agreeing(row, claimed, measured)
        else:
            row = self._either(row, number, claimed, measured)
        return self._digits(row, number, native, claimed)

    def _held(self, measured: list[Measured]) -> str:
        for m in measured:
            if m.free is None:
                continue
            gap = abs(m.free.value - m.slope.value)
            # Beyond a hundred-thousandth of the gradient; less is a softmax's shift.
            if gap > 3 * (m.free.error + m.slope.error) + 1e-5 * m.norm:
                return "trusted" if self.measuring.problem.taps else "stopped"
        return ""

    def _either(
        self, row: LeafCheck, number: int, claimed: Leaf, measured: list[Measured]
    ) -> LeafCheck:
        """Whether a `stop_gradient` in a rule's forward part holds or not is open.

        By the rule it needn't; without the rule it would. Either gradient is right, and
        a wrong one is told by the one that's nearer.
        """
        if not self.measuring.reference.inner_stops:
            return self._doubtful(row, number, claimed, measured)
        judge = replace(self, measuring=replace(self.measuring, hold=2))
        held = judge.measuring.again(number, measured)
        if sum(m.gap for m in held) >= sum(m.gap for m in measured):
            return self._doubtful(row, number, claimed, measured)
        row = replace(row, held="stopped")
        if _agree(held):
            return judge._agreeing(row, claimed, held)
        return judge._doubtful(row, number, claimed, held)

    def _unseen(self, claimed: Leaf, measured: list[Measured]) -> Measured | None:
        """The slope, if any, that would not show an error of `rtol`."""
        allowed = self.rtol * size_of(claimed)
        # Of an error that's spread like the direction.
        coarse = [m for m in measured if not m.slope.error / m.length <= allowed]
        return max(coarse, key=lambda m: m.slope.error / m.length, default=None)

    def _agreeing(
        self, row: LeafCheck, claimed: Leaf, measured: list[Measured]
    ) -> LeafCheck:
        relative = max(_ratio(m.gap, m.norm) for m in measured)
        m = self._unseen(claimed, measured)
        if m is None:
            return replace(row, relative_error=relative)
        return replace(
            row,
            verdict="undecided",
            relative_error=relative,
            text="the loss's values give the slope along a direction as "
            f"{m.slope.value:.4g} give or take {m.slope.error:.2g}, which is too "
            f"coarse for rtol={self.rtol:g} (the gradient says {m.claimed:.4g})",
        )

    def _nothing(self, number: int, m: Measured) -> bool:
        """Whether a gradient is zero up to rounding, and so the loss's values say.

        Such as that of a bias before a batch norm. Moved by fifty roundings, a
        gradient that is nothing but rounding becomes another; a small one stays. One so
        small that the loss would not change by a rounding is zero for all that shows.
        """
        scale = self.measuring.reference.scale
        claimed = self.measuring.claim.tested[number]
        # No change is claimed, and none at all is seen, if only at the smallest steps.
        if m.slope.value == 0 and not any_nonzero(claimed):
            return bool(m.slope.error <= self.rtol * scale)
        if abs(m.slope.value) > m.slope.error or m.slope.error > _FAINT * scale:
            return False
        if m.norm <= max(m.noise, np.finfo(np.float64).eps * scale):
            return True
        if self.measuring.claim.nudged is None:
            return False
        change = gap_of(claimed, self.measuring.claim.nudged()[number])
        return bool(size_of(claimed) <= 10 * change)

    def _by_rounding(self, number: int, measured: list[Measured], agree: bool) -> bool:
        """Whether a gradient differs by no more than its own rounding, or is no more.

        As at an optimum: what is left of the gradient there is smaller than ten times
        what fifty roundings of the parameters change in it, and far below the loss.
        Where the slopes `agree`, though too coarse to show an error, it must be that.
        """
        faint = 0.1 * _FAINT * self.measuring.reference.scale
        if self.measuring.claim.nudged is None or not all(
            m.gap <= faint and not m.slope.kink for m in measured
        ):
            return False
        both = (
            self.measuring.claim.tested[number],
            self.measuring.claim.nudged()[number],
        )
        rounding = [10 * change_along(*both, m.direction()) for m in measured]
        return all(
            (m.norm <= r if agree else m.gap <= m.slope.error + r) and r <= faint
            for m, r in zip(measured, rounding, strict=True)
        )

    def _doubtful(
        self, row: LeafCheck, number: int, claimed: Leaf, measured: list[Measured]
    ) -> LeafCheck:
        """The verdict where the claim and the values differ: by single entries."""
        suspects = self._suspects(number, claimed, measured)
        kinks = [m.slope for m in measured if m.slope.kink]
        # (Not on kinks: a sum of some that are convex and some that are concave may
        # have one-sided slopes closer to each other than any gradient's.)
        smooth = [m for m in measured if not m.slope.kink]
        differing = [m for m in smooth if not m.agrees]
        unclear = bool(differing) and all(m.open for m in differing)
        everywhere = len(suspects.places) == claimed.size
        slopes = self.measuring.entries(number, suspects.places)
        places = suspects.places
        said, noise = values_at(claimed, places), self._noise(number, places)
        unsure = [is_open(c, s, n) for c, s, n in zip(said, slopes, noise, strict=True)]
        bars = np.where(unsure, np.inf, [s.error for s in slopes])
        settled = np.array(
            [
                s.kink and within(c, s, n)
                for c, s, n in zip(said, slopes, noise, strict=True)
            ],
            bool,
        )
        value = np.array([s.value for s in slopes])
        # Any number between one-sided slopes is right; an infinite bar says nothing.
        value = np.where(settled | ~np.isfinite(bars), said, value)
        right = with_values(suspects.right, places, value)
        error = np.abs(said - value)
        allowed = allowed_at(claimed, right, *self._measure(number), places)
        wrong = (error > allowed + bars) & ~settled
        size, off = known_sizes(claimed, right)
        loose = np.where(settled | ~np.isfinite(bars), 0.0, bars)
        bar = float(np.linalg.norm(loose) + np.linalg.norm(noise))
        if suspects.total is None:  # the entries are but a sample
            relative = max((_ratio(m.gap, m.norm) for m in smooth), default=0.0)
            beyond = any(not m.allowed(_CHANCE * self.rtol) for m in smooth)
        else:
            relative = _ratio(off, size)
            beyond = bool(off > self.rtol * size + bar)
        row = replace(row, relative_error=relative)
        if beyond and not wrong.any():
            # Many entries are a little off, each by less than it may be.
            wrong = (error > bars + noise) & ~settled
        # Of a sample some must be seen to be wrong; and on kinks another gradient than
        # the candidate may be right as well.
        whole = suspects.total is not None and not everywhere and not kinks
        proven = beyond and whole
        if not unclear and (wrong.any() or proven):
            shown = [k for k in np.argsort(-error, kind="stable") if wrong[k]][:_SHOWN]
            count = int(wrong.sum()) if everywhere else suspects.total
            entries = self._rows(claimed, places[shown], [slopes[k] for k in shown])
            return replace(
                row,
                verdict="wrong",
                wrong_entries=count,
                entries=entries,
                cause=self._cause(
                    number, Wrong(claimed, right, bar, suspects, entries)
                ),
            )
        if kinks or settled.any():
            on = [k for k, here in enumerate(settled) if here]
            on = on[:_SHOWN]
            rows = self._rows(claimed, places[on], [slopes[k] for k in on])
            row = replace(row, entries=rows)
            return _on_kink(row, slopes[on[0]] if on else kinks[0])
        least = max(
            self.rtol * size, (size == 0) * _FAINT * self.measuring.reference.scale
        )
        coarse = everywhere and not bars.max(initial=0.0) <= least
        if unclear or beyond or coarse:
            return self._unclear(row)
        return row

    def _suspects(
        self, number: int, claimed: Leaf, measured: list[Measured]
    ) -> Suspects:
        if claimed.size <= SMALL_LEAF:
            unknown = filled(claimed, np.nan)
            return Suspects(np.arange(claimed.size), unknown, claimed.size)
        right = self._borne_out(number, measured)
        if right is not None:
            # On kinks many a right entry differs: more of them are looked at.
            most = 8 * _SHOWN if any(m.slope.kink for m in measured) else _SHOWN
            found = beyond(claimed, right, *self._measure(number), most)
            return Suspects(found.places, right, found.total, found.rest)
        doubtful = [
            m for m in measured if not (m.between if m.slope.kink else m.agrees)
        ]
        if not doubtful:
            return Suspects(np.array([], int), claimed, 0)
        worst = max(doubtful, key=lambda m: m.gap / (m.norm or 1))
        located = locate(self.measuring, number, claimed, worst.direction(), self.rtol)
        places = np.array(located.places[: 2 * _SHOWN], int)
        if located.spread:
            return Suspects(places, filled(claimed, np.nan), None)
        return Suspects(places, claimed, len(located.places))

    def _borne_out(self, number: int, measured: list[Measured]) -> Leaf | None:
        """A candidate that agrees with all that was measured."""
        for candidate in self.candidates():
            array = candidate[number]
            again = [compared(m.direction, m.slope, array, 0.0) for m in measured]
            if is_finite(array) and all(
                m.between if m.slope.kink else m.agrees for m in again
            ):
                return array
        return None

    def _noise(self, number: int, places: np.ndarray) -> np.ndarray:
        noise = self.measuring.claim.noise[number]
        if isinstance(noise, float):
            return np.full(len(places), noise)
        return values_at(noise, places)

    def _measure(self, number: int) -> tuple[Leaf | float, Leaf, float]:
        """What says how much an entry may be off by."""
        noise = self.measuring.claim.noise[number]
        return noise, self.measuring.value(number), self.rtol

    def _rows(
        self, claimed: Leaf, places: np.ndarray, slopes: Sequence[Slope]
    ) -> tuple[EntryCheck, ...]:
        said = values_at(claimed, places)
        return tuple(
            EntryCheck(
                tuple(int(i) for i in np.unravel_index(place, claimed.shape)),
                float(ours),
                slope.value,
                slope.error,
            )
            for place, ours, slope in zip(places, said, slopes, strict=True)
        )

    def _unclear(self, row: LeafCheck) -> LeafCheck:
        return replace(
            row,
            verdict="undecided",
            text="the gradient and the loss's values differ along random directions "
            "by more than they should, and single entries can't be told apart finely "
            "enough to say where",
        )

    def _cause(self, number: int, wrong: Wrong) -> Cause:
        """Why a leaf's gradient is wrong."""
        problem, claim = self.measuring.problem, self.measuring.claim
        tested = dict(zip(problem.names, claim.tested, strict=True))
        parts = functools.partial(self.parts, number)
        return blame(problem.names[number], wrong, tested, self.counts, parts)

    def _digits(
        self, row: LeafCheck, number: int, native: Leaf, claimed: Leaf
    ) -> LeafCheck:
        if not self.measuring.claim.native:
            return row
        eps = epsilon(row.dtype)
        error = _ratio(gap_of(native, claimed), size_of(claimed))
        digits = min(-math.log10(max(error, 1e-17)), 1 - math.log10(eps))
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


def _agree(measured: Sequence[Measured]) -> bool:
    return all(m.agrees and not m.slope.kink for m in measured)


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
