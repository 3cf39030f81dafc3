"""Finds the wrong entries of a gradient by halving, from the loss's values alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from jaxgrad.checking.measuring import ROUNDING, Measuring
from jaxgrad.checking.reference import Probe


class Located(NamedTuple):
    """Entries whose claimed gradient is wrong.

    Attributes:
      places: their places in the flattened leaf; a sample where they are many.
      spread: whether they are too many to be told one by one.
    """

    places: list[int]
    spread: bool


# More groups than this with an error in each: the error is everywhere.
_MANY = 32
_PARTS = 4
# A group is followed if its error stands out of the other groups' by this factor: noise
# in the gradient is spread, and has about one size in groups of one size.
_STANDS_OUT = 30


def locate(
    measuring: Measuring,
    leaf: int,
    claimed: np.ndarray,
    direction: np.ndarray,
    rtol: float,
) -> Located:
    """Splits the entries into ever smaller groups, and follows those that disagree.

    For k wrong entries of n it takes O(k log n) slopes.
    """
    flat, move = claimed.ravel(), direction.ravel()
    groups = [np.flatnonzero(move)]
    while any(len(group) > 1 for group in groups):
        parts = [
            part
            for group in groups
            for part in np.array_split(group, min(_PARTS, len(group)))
        ]
        gaps, bars, norms = _gaps(measuring, leaf, flat, move, claimed.shape, parts)
        shares = gaps / np.where(norms > 0, norms, 1)
        noise = _STANDS_OUT * np.sort(shares)[(len(shares) - 1) // 4]
        noise = min(noise, rtol)  # more is no noise
        wrong = np.flatnonzero((gaps > bars) & (shares > noise))
        if not len(wrong):
            wrong = np.array([np.argmax(shares)])
        groups = [parts[k] for k in wrong]
        if len(groups) > _MANY:
            rng = np.random.default_rng(0)
            largest = [int(group[np.argmax(np.abs(flat[group]))]) for group in groups]
            some = [int(rng.choice(group)) for group in groups]
            both = [place for pair in zip(largest, some, strict=True) for place in pair]
            return Located(list(dict.fromkeys(both)), spread=True)
    return Located([int(group[0]) for group in groups], spread=False)


def _gaps(
    measuring: Measuring,
    leaf: int,
    claimed: np.ndarray,
    move: np.ndarray,
    shape: tuple[int, ...],
    parts: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By how much each group disagrees, its error bar, and its gradient's size."""

    def direction(part: np.ndarray) -> np.ndarray:
        some = np.zeros(move.size)
        some[part] = move[part]
        return some.reshape(shape)

    probes = [Probe(leaf, functools.partial(direction, part)) for part in parts]
    slopes = measuring.reference.slopes(probes, hold=measuring.hold)
    gaps, bars, norms = [], [], []
    for part, slope in zip(parts, slopes, strict=True):
        products = claimed[part] * move[part]
        norms.append(float(np.linalg.norm(products)))
        bars.append(slope.error + ROUNDING * norms[-1])
        if slope.kink:
            low, high = sorted((slope.ahead, slope.behind))
            gaps.append(max(low - products.sum(), products.sum() - high, high - low))
        else:
            gaps.append(abs(products.sum() - slope.value))
    return np.array(gaps), np.array(bars), np.array(norms)
