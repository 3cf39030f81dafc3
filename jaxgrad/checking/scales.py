"""How far a leaf's entries are moved: by their sizes, those of one size at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgrad.checking.leaves import (
    Leaf,
    filled,
    made_of_leaf,
    read_of_leaf,
    spread_like,
)
from jaxgrad.checking.sums import scaled

# Entries of a leaf whose sizes are further apart than this are displaced on their own:
# a step in proportion to each entry's size would show the small ones too faintly.
_DECADES = 4
_ZERO = 127  # the group of the zeros


Scale = Callable[[], Leaf]


def scales_of(of: Scale) -> list[list[Scale]]:
    """Groups of a leaf's entries, of about one size, each with the scales to try.

    A step is in proportion to each entry's size, since that is the best guess at the
    scale on which the loss changes; for a zero, and for what is tiny beside the rest,
    the leaf's typical size is tried too. A scale is 0 at the other groups' entries.
    The leaf is made by `of` whenever it's needed, so that large ones don't pile up.
    """
    leaf = of()
    largest = _largest(leaf)
    if largest == 0:
        return [[lambda: filled(of(), 1.0)]]
    group, typical = _grouped(leaf, float(largest)), float(_typical(leaf))

    def own(number: int) -> Scale:
        return lambda: _own(of(), group, number)

    def same(number: int, scale: float) -> Scale:
        return lambda: _same(group, number, scale)

    groups: list[list[Scale]] = []
    for number in _numbers(group):
        if number == _ZERO:
            sizes = [typical] if 0.1 < typical < 10 else [typical, 1.0]
            groups.append([same(number, size) for size in sizes])
        elif number == 0:
            groups.append([own(number)])
        else:
            groups.append([own(number), same(number, typical)])
    return groups


def random_direction(scale: Scale, seed: tuple[int, ...]) -> Scale:
    """A direction of random signs and sizes, in proportion to a scale."""

    def direction() -> Leaf:
        sizes = scale()
        signs = spread_like(np.random.default_rng(seed), sizes)
        return scaled(signs, sizes)  # type: ignore[no-any-return]

    return direction


def _numbers(group: Leaf) -> list[int]:
    """The groups that there are."""
    if isinstance(group, np.ndarray):
        return [int(number) for number in np.unique(group)]
    found: list[int] = []
    number = int(_next(group, -1))
    while number <= _ZERO:
        found.append(number)
        number = int(_next(group, number))
    return found


@read_of_leaf
def _next(xp: Any, group: Leaf, number: Any) -> Any:
    later = group.astype(xp.int32)
    return xp.where(later > number, later, _ZERO + 1).min()


@read_of_leaf
def _largest(xp: Any, leaf: Leaf) -> Any:
    return xp.abs(leaf).max(initial=0.0)


@read_of_leaf
def _typical(xp: Any, leaf: Leaf) -> Any:
    """The root mean square of the entries that aren't zero."""
    if xp is np:
        return np.sqrt(np.mean(np.square(leaf[leaf != 0])))
    return xp.sqrt(xp.sum(xp.square(leaf)) / xp.count_nonzero(leaf))


@made_of_leaf
@np.errstate(divide="ignore")
def _grouped(xp: Any, leaf: Leaf, largest: Any) -> Any:
    decades = (xp.log10(largest) - xp.log10(xp.abs(leaf))) / _DECADES
    return xp.minimum(decades, _ZERO).astype(xp.int8)


@made_of_leaf
def _own(xp: Any, leaf: Leaf, group: Leaf, number: Any) -> Any:
    return xp.where(group == number, xp.abs(leaf), 0.0)


@made_of_leaf
def _same(xp: Any, group: Leaf, number: Any, scale: Any) -> Any:
    return xp.where(group == number, scale, 0.0)
