"""Finds where the numbers of a leaf stand, by looking their values up.

Some lines of a leaf, one along each axis, are looked up in all parameters at once. They
say which parameter has them, where the leaf must be cut, and the offsets per axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.matching.content import Block, coarser

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]
Names = tuple[str, ...]

_AT_ONCE = 1 << 20
_BITS = 22
# A value that stands in more places of one parameter than this says nothing.
_MANY = 4
# Lines through so many entries of a block are looked up.
_LINES = 3
# A leaf is cut in no more single layers than this.
_LAYERS = 256
# So many steps between neighbours aren't equal by chance.
_REGULAR = 3
# In fewer numbers than these, hardly any is found by chance.
_CHANCE = 1_000_000


class Line(NamedTuple):
    """A line of a block along an axis: its entries' places, by the parameter.

    `places[names]` has a row per entry of the line, and `_MANY` places, -1 for none.
    """

    axis: int
    at: tuple[int, ...]
    places: dict[Names, Places]


class Found(NamedTuple):
    """What the lookup says of a block: offsets in parameters, or where to cut it."""

    offsets: dict[Names, tuple[Places, ...]]
    cuts: tuple[int, tuple[int, ...]] | None  # an axis, and where


def look_up(
    blocks: Sequence[tuple[Block, Array]], arrays: Mapping[Names, Array]
) -> list[Found]:
    """Looks up each block (given with its values) in the flat parameters."""
    lines: list[list[Line]] = []
    values: list[tuple[Line, Array]] = []
    for block, array in blocks:
        rng = np.random.default_rng(block.size)
        mine = []
        for _ in range(_LINES):
            at = tuple(int(rng.integers(0, n)) for n in block.shape)
            for axis in range(len(block.shape)):
                line = Line(axis, at, {})
                mine.append(line)
                index: tuple[Any, ...] = (*at[:axis], slice(None), *at[axis + 1 :])
                values.append((line, array[index]))
        lines.append(mine)
    by_dtype: dict[Any, list[tuple[Line, Array]]] = {}
    for line, along in values:
        by_dtype.setdefault(along.dtype, []).append((line, along))
    for dtype, some in by_dtype.items():
        _fill(dtype, some, arrays)
    return [
        _found(block, mine, arrays)
        for (block, _), mine in zip(blocks, lines, strict=True)
    ]


def _bits(values: Array, dtype: np.dtype[Any]) -> Array:
    """The values as unsigned integers, rounded to `dtype`; -0 is 0."""
    rounded = values.astype(dtype, copy=False)
    return rounded.view(np.dtype(f"u{dtype.itemsize}"))


def _fill(
    dtype: np.dtype[Any],
    lines: Sequence[tuple[Line, Array]],
    arrays: Mapping[Names, Array],
) -> None:
    """Finds the places of all values, in one pass over the parameters."""
    every = np.concatenate([along for _, along in lines])
    ends = np.cumsum([len(along) for _, along in lines])
    tables: dict[Any, tuple[Array, Array, Array]] = {}
    for names, flat in arrays.items():
        key = coarser(dtype, flat.dtype)
        if key not in tables:
            wanted, back = np.unique(_bits(every, key), return_inverse=True)
            # 0, and what repeats often, can't be told apart.
            often = np.bincount(back.reshape(-1), minlength=len(wanted)) > 64
            often |= np.isin(wanted, _bits(np.array([0.0, -0.0, 1.0]), key))
            table = np.zeros(1 << _BITS, np.bool_)
            table[_hash(wanted[~often])] = True
            tables[key] = wanted, back.reshape(-1), table
        wanted, back, table = tables[key]
        which, where = _hits(flat, key, wanted, table)
        if not len(which):
            continue
        places = _by_value(which, where, len(wanted))
        for (line, along), end in zip(lines, ends, strict=True):
            mine = places[back[end - len(along) : end]]
            if (mine >= 0).any():
                line.places[names] = mine


def _hash(bits: Array) -> Array:
    if bits.itemsize == 8:
        bits = (bits ^ (bits >> np.uint64(29))).astype(np.uint32)
    elif bits.itemsize < 4:
        return bits
    mixed = bits * np.uint32(2654435769)
    mixed >>= np.uint32(32 - _BITS)
    return mixed


def _hits(
    flat: Array, key: np.dtype[Any], wanted: Array, table: Array
) -> tuple[Places, Places]:
    which, where = [], []
    dead = np.zeros(len(wanted), np.bool_)
    for first in range(0, len(flat), _AT_ONCE):
        bits = _bits(flat[first : first + _AT_ONCE], key)
        maybe = np.flatnonzero(np.take(table, _hash(bits)))
        if not len(maybe):
            continue
        seen = bits[maybe]
        at = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        right = (wanted[at] == seen) & ~dead[at]
        at, maybe = at[right], maybe[right]
        counted = np.bincount(at, minlength=len(wanted)) if len(at) > 10000 else None
        if counted is not None and (counted > _MANY).any():
            # They would fill the memory.
            dead |= counted > _MANY
            keep = ~dead[at]
            at, maybe = at[keep], maybe[keep]
        which.append(at)
        where.append(maybe + first)
    if not which:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    all_which, all_where = np.concatenate(which), np.concatenate(where)
    keep = ~dead[all_which]
    return all_which[keep], all_where[keep]


def _by_value(which: Places, where: Places, many: int) -> Places:
    """Per value, its places; none where there are too many."""
    order = np.argsort(which, kind="stable")
    which, where = which[order], where[order]
    counted = np.bincount(which, minlength=many)
    nth = np.arange(len(which)) - (np.cumsum(counted) - counted)[which]
    places = np.full((many, _MANY), -1, np.int64)
    keep = counted[which] <= _MANY
    places[which[keep], nth[keep]] = where[keep]
    return places


def _found(block: Block, lines: list[Line], arrays: Mapping[Names, Array]) -> Found:
    offsets: dict[Names, tuple[Places, ...]] = {}
    repeated: tuple[int, tuple[int, ...]] | None = None
    names: dict[Names, None] = {}
    for line in lines:
        names.update(dict.fromkeys(line.places))
    for name in names:
        if not all(_covered(block, line, name) for line in lines[: len(block.shape)]):
            continue
        along = _offsets(block, lines, name, len(arrays[name]))
        if along is None:
            continue
        twice = [a for a, o in enumerate(along) if len(np.unique(o)) < len(o)]
        if twice:
            # Equal layers, stacked: each is a block of its own.
            repeated = twice[0], tuple(range(1, block.shape[twice[0]]))
        else:
            offsets[name] = along
    if offsets or repeated:
        return Found(offsets, None if offsets else repeated)
    # By chance, places are found too, but not in a regular order.
    few = sum(map(len, arrays.values())) < _CHANCE
    if not few and max(map(_regular, lines), default=0) < _REGULAR:
        return Found({}, None)
    # The axis that is cut into the fewest blocks, if it's cut.
    best: tuple[int, tuple[int, ...]] | None = None
    for line in lines:
        cuts = _cuts(block, line)
        if cuts and (best is None or len(cuts) < len(best[1])):
            best = line.axis, cuts
    return Found({}, best)


def _covered(block: Block, line: Line, name: Names) -> bool:
    """Whether a parameter has most of a line, and both its ends."""
    if name not in line.places:
        return block.shape[line.axis] == 1
    has = np.asarray((line.places[name] >= 0).any(axis=1))
    if has.mean() < 0.6:
        return False
    at = np.flatnonzero(has)
    return bool(at[0] <= 2 and at[-1] >= len(has) - 3)


def _regular(line: Line) -> int:
    """How many neighbours on the line are as far apart in one parameter, at most."""
    most = [0]
    for places in line.places.values():
        known = _sure(places)
        apart = np.diff(known)[(known[1:] >= 0) & (known[:-1] >= 0)]
        most.append(int(np.unique(apart, return_counts=True)[1].max(initial=0)))
    return max(most)


def _cuts(block: Block, line: Line) -> tuple[int, ...]:
    """Where another parameter begins along a line."""
    length = block.shape[line.axis]
    if length == 1 or not line.places:
        return ()
    every = np.stack([(p >= 0).any(axis=1) for p in line.places.values()])
    if every.any(axis=0).mean() < 0.5:
        return ()
    # Per parameter and entry, where its run of entries ends: gaps of 2 are jumped.
    stops = np.zeros((len(line.places), length), np.int64)
    for row, has in enumerate(every):
        known = np.flatnonzero(has)
        if len(known):
            ends = np.flatnonzero(np.append(np.diff(known) > 3, True))
            stops[row, known] = np.repeat(known[ends] + 1, np.diff(ends, prepend=-1))
    longest = stops.max(axis=0)
    cuts: list[int] = []
    while not cuts or cuts[-1] < length:
        at = cuts[-1] if cuts else 0
        stop = int(longest[at])
        if stop <= at:
            later = np.flatnonzero(longest[at:] > 0)
            stop = at + int(later[0]) if len(later) else length
        cuts.append(stop)
    if len(cuts) > max(2, length / 3):
        return tuple(range(1, length)) if length <= _LAYERS else ()
    return tuple(cuts[:-1])


def _offsets(
    block: Block, lines: list[Line], name: Names, size: int
) -> tuple[Places, ...] | None:
    """A block's offsets in a parameter, of the lines' entries that agree."""
    base = lines[0].at
    along = []
    for axis, length in enumerate(block.shape):
        same = [line.places.get(name) for line in lines if line.axis == axis]
        line = _voted([places for places in same if places is not None], length)
        if line is None:
            return None
        along.append(line)
    if not along:
        return ()
    # All lines went through the same entry first.
    origins = [int(o[at]) for o, at in zip(along, base, strict=True) if len(o) > 1]
    if not origins:
        return None
    values, counted = np.unique(origins, return_counts=True)
    origin = int(values[np.argmax(counted)])
    fixed = []
    for offsets, at in zip(along, base, strict=True):
        origin += int(offsets.min() - offsets[at])
        fixed.append(offsets - offsets.min())
    fixed[0] = fixed[0] + origin
    low = sum(int(o.min()) for o in fixed)
    high = sum(int(o.max()) for o in fixed)
    return tuple(fixed) if low >= 0 and high < size else None


def _voted(lines: list[Places], length: int) -> Places | None:
    """The places along the first of some parallel lines, by the most votes."""
    if length == 1:
        return np.zeros(1, np.int64)
    if not lines:
        return None
    first = _sure(lines[0])
    votes = [lines[0]]
    for other in lines[1:]:
        both = (first >= 0) & (_sure(other) >= 0)
        if not both.any():
            continue
        apart, counted = np.unique((first - _sure(other))[both], return_counts=True)
        shift = int(apart[np.argmax(counted)])
        votes.append(np.where(other >= 0, other + shift, -1))
    all_votes = np.concatenate(votes, axis=1)
    best, most = np.full(length, -1, np.int64), np.zeros(length, np.int64)
    for column in range(all_votes.shape[1]):
        here = all_votes[:, column]
        agreed = (all_votes == here[:, None]).sum(axis=1)
        better = (here >= 0) & (agreed > most)
        best[better], most[better] = here[better], agreed[better]
    return _filled(best)


def _sure(places: Places) -> Places:
    """The only place of each entry; -1 if it has none or several."""
    return np.where((places >= 0).sum(axis=1) == 1, places.max(axis=1), -1)


def _filled(places: Places) -> Places | None:
    """Fills in the places that weren't found, by the step between those before."""
    known = places >= 0
    if known.mean() < 0.5:
        return None
    pairs = known[1:] & known[:-1]
    if not known.all():
        steps, counted = np.unique(np.diff(places)[pairs], return_counts=True)
        step = int(steps[np.argmax(counted)]) if len(steps) else 0
        for at in range(1, len(places)):
            if places[at] < 0 <= places[at - 1]:
                places[at] = places[at - 1] + step
        for at in range(len(places) - 2, -1, -1):
            if places[at] < 0 <= places[at + 1]:
                places[at] = places[at + 1] - step
    return places
