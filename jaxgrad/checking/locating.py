"""Finds the wrong entries of a gradient by halving, from the loss's values alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxgrad.checking.reference import Probe
from jaxgrad.differences import Slope


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


def locate(
    slopes_of: Callable[[list[Probe]], list[Slope]],
    leaf: int,
    claimed: np.ndarray,
    direction: np.ndarray,
    rounding: float,
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
            for part in np.array_split(group, _PARTS)
            if len(part)
        ]
        groups = _disagreeing(
            slopes_of, leaf, flat, move, claimed.shape, parts, rounding
        )
        if len(groups) > _MANY:
            rng = np.random.default_rng(0)
            some = [int(rng.choice(group)) for group in groups]
            largest = [int(group[np.argmax(np.abs(flat[group]))]) for group in groups]
            return Located(list(dict.fromkeys([*largest, *some])), spread=True)
        if not groups:
            return Located([], spread=True)
    return Located([int(group[0]) for group in groups], spread=False)


def _disagreeing(
    slopes_of: Callable[[list[Probe]], list[Slope]],
    leaf: int,
    claimed: np.ndarray,
    move: np.ndarray,
    shape: tuple[int, ...],
    parts: list[np.ndarray],
    rounding: float,
) -> list[np.ndarray]:
    def direction(part: np.ndarray) -> np.ndarray:
        some = np.zeros(move.size)
        some[part] = move[part]
        return some.reshape(shape)

    probes = [Probe(leaf, lambda part=part: direction(part)) for part in parts]
    wrong = []
    for part, slope in zip(parts, slopes_of(probes), strict=True):
        products = claimed[part] * move[part]
        bar = slope.error + rounding * float(np.linalg.norm(products))
        if abs(products.sum() - slope.value) > bar or slope.kink:
            wrong.append(part)
    return wrong
