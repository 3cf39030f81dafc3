"""Finds the wrong entries of a gradient by halving, from the loss's values alone."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.checking.leaves import Leaf, linear, made_of_leaf, read_of_leaf
from jaxgrad.checking.measuring import ROUNDING, Measuring
from jaxgrad.checking.reference import Probe
from jaxgrad.checking.sums import product


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


Group = tuple[int, int]
"""The entries from one number to another, of those that may be wrong."""


def locate(
    measuring: Measuring,
    leaf: int,
    claimed: Leaf,
    direction: Leaf,
    rtol: float,
) -> Located:
    """Splits the entries into ever smaller groups, and follows those that disagree.

    For k wrong entries of n it takes O(k log n) slopes.
    """
    entries = _entries_of(claimed, direction)
    groups = [(0, entries.count)]
    while any(stop - start > 1 for start, stop in groups):
        parts = [part for group in groups for part in _split(group)]
        gaps, bars, norms = _gaps(measuring, leaf, entries, parts)
        shares = gaps / np.where(norms > 0, norms, 1)
        noise = _STANDS_OUT * np.sort(shares)[(len(shares) - 1) // 4]
        noise = min(noise, rtol)  # more is no noise
        wrong = np.flatnonzero((gaps > bars) & (shares > noise))
        if not len(wrong):
            wrong = np.array([np.argmax(shares)])
        groups = [parts[k] for k in wrong]
        if len(groups) > _MANY:
            rng = np.random.default_rng(0)
            largest = [entries.largest(*group) for group in groups]
            some = [entries.place(int(rng.choice(np.arange(*g)))) for g in groups]
            both = [place for pair in zip(largest, some, strict=True) for place in pair]
            return Located(list(dict.fromkeys(both)), spread=True)
    return Located([entries.place(start) for start, _ in groups], spread=False)


def _split(group: Group) -> list[Group]:
    """Into parts of about one size."""
    start, stop = group
    count = min(_PARTS, stop - start)
    size, more = divmod(stop - start, max(count, 1))
    ends = [start + k * size + min(k, more) for k in range(count + 1)]
    return list(itertools.pairwise(ends))


def _gaps(
    measuring: Measuring, leaf: int, entries: _OnHost | _OnMesh, parts: list[Group]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By how much each group disagrees, its error bar, and its gradient's size."""
    probes = [
        Probe(leaf, functools.partial(entries.direction, *part)) for part in parts
    ]
    slopes = measuring.reference.slopes(probes, hold=measuring.hold)
    gaps, bars, norms = [], [], []
    for part, slope in zip(parts, slopes, strict=True):
        said, size = entries.product(*part)
        norms.append(size)
        bars.append(slope.error + ROUNDING * size)
        if slope.kink:
            low, high = sorted((slope.ahead, slope.behind))
            gaps.append(max(low - said, said - high, high - low))
        else:
            gaps.append(abs(said - slope.value))
    return np.array(gaps), np.array(bars), np.array(norms)


def _entries_of(claimed: Leaf, move: Leaf) -> _OnHost | _OnMesh:
    if isinstance(claimed, np.ndarray) and isinstance(move, np.ndarray):
        return _OnHost(claimed.ravel(), move.ravel(), np.flatnonzero(move), move.shape)
    return _OnMesh(claimed, move)


@dataclass(frozen=True)
class _OnHost:
    """The entries that move, by their places."""

    claimed: np.ndarray
    move: np.ndarray
    places: np.ndarray
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.places)

    def place(self, number: int) -> int:
        return int(self.places[number])

    def direction(self, start: int, stop: int) -> np.ndarray:
        some = np.zeros(self.move.size)
        part = self.places[start:stop]
        some[part] = self.move[part]
        return some.reshape(self.shape)

    def product(self, start: int, stop: int) -> tuple[float, float]:
        part = self.places[start:stop]
        products = self.claimed[part] * self.move[part]
        return float(products.sum()), float(np.linalg.norm(products))

    def largest(self, start: int, stop: int) -> int:
        part = self.places[start:stop]
        return int(part[np.argmax(np.abs(self.claimed[part]))])


@dataclass(frozen=True)
class _OnMesh:
    """All entries, in their order: no list of places is as large as the leaf."""

    claimed: Leaf
    move: Leaf

    @property
    def count(self) -> int:
        return int(self.move.size)

    def place(self, number: int) -> int:
        return number

    def direction(self, start: int, stop: int) -> Leaf:
        return _between(self.move, start, stop)  # type: ignore[no-any-return]

    def product(self, start: int, stop: int) -> tuple[float, float]:
        said, size = product(self.claimed, self.direction(start, stop))
        return float(said), float(size)

    def largest(self, start: int, stop: int) -> int:
        return int(_largest(self.claimed, start, stop))


@made_of_leaf
def _between(xp: Any, move: Leaf, start: Any, stop: Any) -> Any:
    place = linear(move.shape)
    return xp.where((place >= start) & (place < stop), move, 0.0)


@read_of_leaf
def _largest(xp: Any, claimed: Leaf, start: Any, stop: Any) -> Any:
    place = linear(claimed.shape)
    sizes = xp.where((place >= start) & (place < stop), xp.abs(claimed), -1.0)
    return xp.where(sizes == sizes.max(), place, claimed.size).min()
