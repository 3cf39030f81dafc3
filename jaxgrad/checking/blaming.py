"""Why a leaf's gradient is wrong: what is known of it, for the search for causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxgrad.causes import Cause, Sums, find_cause, find_cause_by_sums
from jaxgrad.checking.entries import Fits, Suspects, fits, known_sizes
from jaxgrad.checking.leaves import Leaf, as_numpy, stays_spread, values_at
from jaxgrad.checking.report import EntryCheck
from jaxgrad.checking.sums import gap_of


class Wrong(NamedTuple):
    """A wrong gradient of a leaf.

    Attributes:
      claimed: what it is.
      right: what it should be, as far as it's known; NaN elsewhere.
      bar: how uncertain that is, as a 2-norm.
      suspects: the entries that were measured.
      entries: those that are wrong, the worst first.
    """

    claimed: Leaf
    right: Leaf
    bar: float
    suspects: Suspects
    entries: Sequence[EntryCheck]


def blame(
    name: str,
    wrong: Wrong,
    tested: Mapping[str, Leaf],
    counts: Mapping[str, int],
    parts: Callable[[], Sequence[tuple[str, np.ndarray]]],
) -> Cause:
    """Finds the cause.

    Args:
      name: the leaf's name.
      wrong: its gradient.
      tested: the claimed gradients of all leaves, by name.
      counts: sizes that a factor may come from, by name.
      parts: makes the parts of the leaf's gradient, one per term of the loss.
    """
    claimed, right, *_ = wrong
    size, gap = map(float, known_sizes(claimed, right))
    # Rounding explains so much, and never the whole difference.
    part = min(max(wrong.bar, 1e-9 * size), gap / 10)
    noise = part / size if size else 1e-9
    others = {
        other: x
        for other, x in tested.items()
        if other != name and x.shape == claimed.shape
    }
    if stays_spread(claimed):
        sums = _sums(wrong, noise, others)
        return find_cause_by_sums(name, sums, counts=counts)
    return find_cause(
        name,
        as_numpy(claimed),
        as_numpy(right),
        counts=counts,
        other_claimed={
            k: as_numpy(x) for k, x in others.items() if not stays_spread(x)
        },
        contributions=parts,
        noise=noise,
    )


def _sums(wrong: Wrong, noise: float, others: Mapping[str, Leaf]) -> Sums:
    """What of a leaf that is spread comes to the host."""
    claimed, right, _, suspects, entries = wrong
    whole = suspects.total is not None
    if not whole:  # what was measured of it
        claimed = values_at(claimed, suspects.places)
        right = values_at(right, suspects.places)
    fit = Fits(*map(float, fits(claimed, right)))
    worst = None
    if entries:
        worst = entries[0].index, entries[0].claimed, entries[0].reference
    return Sums(
        our_norm=fit.claimed,
        right_norm=fit.right,
        off_norm=fit.off,
        size=int(claimed.size),
        nonzero=int(fit.nonzero),
        noise=noise,
        factor=fit.factor,
        unlike=fit.unlike,
        shift=fit.shift,
        uneven=fit.uneven,
        wrong=suspects.total,
        others_off=suspects.rest,
        worst=worst,
        elsewhere={k: float(gap_of(x, right)) for k, x in others.items() if whole},
        whole=whole,
    )
