"""Cuts leaves and parameters in equal parts, and joins what belongs together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from jaxgrad.comparing.layouts import Piece
from jaxgrad.comparing.matching.content import Block, count
from jaxgrad.comparing.matching.orders import Places, Unit, unit

# In how many equal parts something is cut, by shape alone; layers may be more.
_PARTS = range(2, 9)
_LAYERS = 256
# Pieces of no more entries than this are joined, if they are of one parameter.
_JOINED = 1 << 22


def parts_of(one: Unit) -> Iterator[Unit]:
    """A parameter's equal parts, along its first two axes."""
    for axis in range(min(2, len(one.shape))):
        for many in _counts(one.shape, axis):
            for index in range(many):
                yield unit(one.names, one.shape, (axis, index, many))


def _counts(shape: Sequence[int], axis: int) -> list[int]:
    """In how many equal parts an axis may be cut."""
    length = shape[axis]
    counts = {*_PARTS, length} if axis == 0 else set(_PARTS)
    most = min(length, _LAYERS)
    return sorted(n for n in counts if 1 < n <= most and length % n == 0)


def cut_at(block: Block, axis: int, cuts: Sequence[int]) -> list[Block]:
    """Cuts a block along an axis, before these indices."""
    found = []
    for first, last in itertools.pairwise([0, *cuts, block.shape[axis]]):
        start, shape = list(block.start), list(block.shape)
        start[axis] += first
        shape[axis] = last - first
        found.append(Block(block.path, tuple(start), tuple(shape)))
    return found


def layers_of(block: Block) -> list[Block]:
    """Cuts a block into its layers along axis 0."""
    return cut_at(block, 0, range(1, block.shape[0]))


def cuttings(block: Block) -> Iterator[list[Block]]:
    """Ways to cut a block in equal parts: along one axis, or stacked and so cut."""
    ways = [
        (n, axis)
        for axis in range(len(block.shape))
        for n in _counts(block.shape, axis)
    ]
    for many, axis in sorted(ways):
        yield _equal_parts(block, axis, many)
    if block.shape and 1 < block.shape[0] <= _LAYERS:
        for many, axis in sorted(ways):
            if axis:
                layers = layers_of(block)
                yield [p for layer in layers for p in _equal_parts(layer, axis, many)]


def _equal_parts(block: Block, axis: int, many: int) -> list[Block]:
    step = block.shape[axis] // many
    return cut_at(block, axis, range(step, block.shape[axis], step))


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins pieces of one parameter that lie side by side in the leaf."""
    found = sorted(pieces, key=lambda piece: piece.start)
    if len({piece.names for piece in found}) == len(found):
        return found
    for axis in range(len(found[0].start)):
        done: list[Piece] = []
        ends: dict[object, int] = {}  # where a joinable piece is, by what's to follow
        for piece in found:
            where = piece.start, _without(piece.shape, axis), piece.names
            at = ends.pop(where, None)
            both = None if at is None else _both(done[at], piece, axis)
            if at is None or both is None:
                at = len(done)
                done.append(piece)
            else:
                done[at] = piece = both
            after = list(piece.start)
            after[axis] += piece.shape[axis]
            ends[tuple(after), _without(piece.shape, axis), piece.names] = at
        found = done
    return found


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _both(first: Piece, second: Piece, axis: int) -> Piece | None:
    """Two neighbours along an axis as one; `None` if that isn't separable."""
    size = count(first.shape) + count(second.shape)
    if not size or size > _JOINED:
        return None
    bases = [sum(int(o[0]) for o in piece.offsets) for piece in (first, second)]
    ours = [o - o[0] for o in first.offsets]
    theirs = [o - o[0] for o in second.offsets]
    for other, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if other != axis and not np.array_equal(a, b):
            return None
    ours[axis] = np.concatenate([ours[axis], theirs[axis] + bases[1] - bases[0]])
    ours[0] = ours[0] + bases[0]
    places: Places = np.zeros(1, np.int64)
    for along in ours:
        places = np.add.outer(places, along).reshape(-1)
    # What is used twice stays apart, so that its gradients are added.
    if len(np.unique(places)) < len(places):
        return None
    return Piece(first.names, first.start, tuple(ours))
