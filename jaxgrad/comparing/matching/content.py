"""Compares numbers of two frameworks: equal after rounding, and how many are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Piece, gathered

Array = npt.NDArray[Any]

# So many numbers are compared at a time, so that copies take little memory.
_AT_ONCE = 1 << 19
# A sample of so many entries tells if two arrays are equal up to a few entries.
SAMPLE = 256
# A match needs this share of equal entries.
MOST = 0.6


class Block(NamedTuple):
    """A block of a leaf, for which a parameter is looked for."""

    path: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many entries it has."""
        return count(self.shape)

    @property
    def region(self) -> tuple[slice, ...]:
        """The block in the leaf."""
        both = zip(self.start, self.shape, strict=True)
        return tuple(slice(first, first + length) for first, length in both)


@dataclass(frozen=True)
class Differing:
    """Entries of a leaf that aren't those of its parameters.

    Attributes:
      path: the leaf's path.
      index: the entry that differs the most.
      leaf: its value in the leaf.
      torch: the value that PyTorch's parameters have there.
      count: how many entries differ.
      size: of how many.
    """

    path: str
    index: tuple[int, ...]
    leaf: float
    torch: float
    count: int
    size: int


def count(shape: Sequence[int]) -> int:
    """How many entries an array of this shape has."""
    size = 1
    for length in shape:
        size *= int(length)
    return size


@lru_cache(maxsize=256)
def coarser(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    """Of two dtypes, the one that tells fewer numbers apart."""
    return max(first, second, key=precision)


@lru_cache(maxsize=256)
def precision(dtype: np.dtype[Any]) -> float:
    """The relative distance of neighbouring numbers; 0 for integers."""
    if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return 0.0
    # 1 and the next number: `np.finfo` doesn't know bfloat16.
    step = 1.0
    while np.asarray(1 + step / 2).astype(dtype).astype(np.float64) != 1:
        step /= 2
    return step


def agree(leaf: Array, torch: Array, slack: float = 0.0) -> npt.NDArray[np.bool_]:
    """Where two arrays are equal, rounded to the coarser dtype; NaN equals NaN.

    `slack` is by how much a sum may differ, in units of the coarser dtype's precision
    and the array's size.
    """
    dtype = coarser(leaf.dtype, torch.dtype)
    leaf, torch = leaf.astype(dtype, copy=False), torch.astype(dtype, copy=False)
    with np.errstate(all="ignore"):
        same = leaf == torch
        if not same.all():
            same = same | ((leaf != leaf) & (torch != torch))
            if slack:
                wide, other = leaf.astype(np.float64), torch.astype(np.float64)
                room = slack * precision(dtype)
                same = same | (np.abs(wide - other) <= room)
    return np.asarray(same)


@lru_cache(maxsize=512)
def some_places(size: int, most: int = SAMPLE) -> npt.NDArray[np.int64]:
    """Some entries of an array, the same ones each time; all of a small array."""
    if size <= most:
        return np.arange(size)
    rng = np.random.default_rng(size)
    places = rng.integers(0, size, most)
    places[0], places[-1] = 0, size - 1
    return places


class Sample(NamedTuple):
    """Entries of a block: some by chance, and some that tell much.

    Attributes:
      places: their flat places in the block, taken by chance.
      values: their values.
      rare_places: places whose values are seldom among the others.
      rare: their values.
      plain: whether equality tells nothing: only a few round numbers.
      constant: whether all values are the same.
      distinct: whether hardly any value repeats, so that each tells where it is from.
    """

    places: npt.NDArray[np.int64]
    values: Array
    rare_places: npt.NDArray[np.int64]
    rare: Array
    plain: bool
    constant: bool
    distinct: bool


def sample(block: Array) -> Sample:
    """Takes a sample of a block."""
    places = some_places(block.size)
    values = _taken(block, places)
    more = some_places(block.size, 16 * SAMPLE)
    wide = _taken(block, more)
    as_float = wide.astype(np.float64)
    distinct, first, back = np.unique(as_float, return_index=True, return_inverse=True)
    # At most two entries of each value; the rarest values tell the most.
    seen = np.bincount(back.reshape(-1), minlength=len(distinct))
    chosen = first[np.argsort(seen, kind="stable")[:SAMPLE]]
    rare_places, rare = more[chosen], wide[chosen]
    plain = len(distinct) <= 2 and all(
        _is_round(x, precision(block.dtype)) for x in distinct
    )
    constant = len(distinct) <= 1
    once = len(more) > SAMPLE and len(distinct) >= 0.9 * len(np.unique(more))
    return Sample(places, values, rare_places, rare, plain, constant, once)


def _taken(block: Array, places: npt.NDArray[np.int64]) -> Array:
    if not block.shape:
        return block.reshape(1)[places]
    return np.asarray(block[np.unravel_index(places, block.shape)])


def _is_round(value: float, precise: float) -> bool:
    """Whether many a constant has this value: 0, 1, 0.5, 0.02."""
    if not np.isfinite(value):
        return True
    return bool(abs(float(f"{value:.2g}") - value) <= precise * abs(value))


def tiles(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Cuts a block into tiles of limited size, to be compared one after another."""
    if not shape:
        yield ()
        return
    inner = max(1, count(shape[1:]))
    step = max(1, _AT_ONCE // inner)
    for first in range(0, shape[0], step):
        rows = slice(first, min(first + step, shape[0]))
        if inner <= _AT_ONCE or len(shape) == 1:
            yield (rows, *(slice(0, length) for length in shape[1:]))
        else:
            for rest in tiles(shape[1:]):
                yield (rows, *rest)


def part(piece: Piece, tile: Sequence[slice]) -> Piece:
    """A tile of a piece."""
    offsets = tuple(o[t] for o, t in zip(piece.offsets, tile, strict=True))
    start = tuple(s + t.start for s, t in zip(piece.start, tile, strict=True))
    return Piece(piece.names, start, offsets)


def slack_of(names: Sequence[str], arrays: Mapping[str, Array]) -> float:
    """By how much a sum may differ when it was added in another precision."""
    if len(names) == 1:
        return 0.0
    wide = (arrays[name].astype(np.float64) for name in names)
    return float(sum(np.abs(array).max(initial=0) for array in wide))


def share(leaf: Array, piece: Piece, arrays: Mapping[str, Array]) -> float:
    """The share of a piece's entries that are equal in the leaf."""
    equal, size = 0, 0
    slack = slack_of(piece.names, arrays)
    for tile in tiles(piece.shape):
        small = part(piece, tile)
        same = agree(leaf[small.block], gathered(small, arrays), slack)
        equal += int(np.count_nonzero(same))
        size += same.size
    return equal / size if size else 1.0


def differing(
    path: str,
    leaf: Array,
    pieces: Sequence[Piece],
    arrays: Mapping[str, Array],
    transform: Callable[[Any], Any] | None = None,
) -> Differing | None:
    """The entries of a leaf that aren't what its pieces say; `None` if all are."""
    worst, where, values, total = -1.0, (0,) * leaf.ndim, (0.0, 0.0), 0

    def look(start: tuple[int, ...], ours: Array, theirs: Array, slack: float) -> None:
        nonlocal worst, where, values, total
        same = agree(ours, theirs, slack)
        if same.all():
            return
        total += int(np.count_nonzero(~same))
        with np.errstate(all="ignore"):
            apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        apart = np.where(same, -1.0, np.where(np.isnan(apart), np.inf, apart))
        at = np.unravel_index(int(np.argmax(apart)), apart.shape)
        if apart[at] > worst:
            worst = float(apart[at])
            where = tuple(s + int(i) for s, i in zip(start, at, strict=True))
            values = float(ours[at]), float(theirs[at])

    if transform is not None:
        (piece,) = pieces
        theirs = np.asarray(transform(arrays[piece.names[0]]))
        scale = float(np.abs(theirs.astype(np.float64)).max(initial=0))
        look((0,) * leaf.ndim, leaf, theirs, 4 * scale)
    else:
        for piece in pieces:
            slack = slack_of(piece.names, arrays)
            for tile in tiles(piece.shape):
                small = part(piece, tile)
                ours = np.asarray(leaf[small.block])
                look(small.start, ours, gathered(small, arrays), slack)
        for block in uncovered(Block(path, (0,) * leaf.ndim, leaf.shape), pieces):
            for tile in tiles(block.shape):
                both = zip(block.start, tile, strict=True)
                at = tuple(slice(s + t.start, s + t.stop) for s, t in both)
                ours = np.asarray(leaf[at])
                look(tuple(s.start for s in at), ours, np.zeros_like(ours), 0.0)
    if not total:
        return None
    return Differing(path, where, *values, total, leaf.size)


def uncovered(block: Block, pieces: Sequence[Piece]) -> list[Block]:
    """What the pieces leave of a block, as blocks."""
    rest = [block]
    for piece in pieces:
        rest = [small for part in rest for small in _without(part, piece)]
    return [part for part in rest if part.size]


def _without(block: Block, piece: Piece) -> list[Block]:
    """A block less a piece: the slabs on either side of it, axis by axis."""
    if not block.shape:
        return []
    low = [max(a, b) for a, b in zip(block.start, piece.start, strict=True)]
    high = [
        min(a + m, b + n)
        for a, m, b, n in zip(
            block.start, block.shape, piece.start, piece.shape, strict=True
        )
    ]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return [block]
    found = []
    start, stop = list(block.start), [a + m for a, m in zip(*block[1:], strict=True)]
    for axis in range(len(start)):
        for a, b in ((start[axis], low[axis]), (high[axis], stop[axis])):
            if a < b:
                first, last = list(start), list(stop)
                first[axis], last[axis] = a, b
                shape = tuple(y - x for x, y in zip(first, last, strict=True))
                found.append(Block(block.path, tuple(first), shape))
        start[axis], stop[axis] = low[axis], high[axis]
    return found
