"""In what orders a parameter's numbers may stand in a leaf, judging by the shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Piece
from jaxgrad.comparing.matching.content import count

Places = npt.NDArray[np.int64]

# No more orders than these are tried for one pair of shapes.
_MOST = 5000


class Unit(NamedTuple):
    """A parameter, or one of the equal parts that it's cut into along an axis.

    Attributes:
      names: the parameter; several if it's their sum.
      shape: the unit's shape.
      steps: how far apart its neighbours are in the flat parameter, per axis.
      base: where its first entry stands.
      mark: which part it is, as `(index, of how many)`; none if it's all of it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    base: int = 0
    mark: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """How many entries it has."""
        return count(self.shape)


class View(NamedTuple):
    """An order of a unit's numbers: axes, from the slowest to the fastest."""

    lengths: tuple[int, ...]
    steps: tuple[int, ...]

    def places(self, flat: Places) -> Places:
        """Where the entries of the leaf stand in the unit."""
        if not self.lengths:
            return np.zeros(len(flat), np.int64)
        index = np.unravel_index(flat, self.lengths)
        steps = zip(index, self.steps, strict=True)
        return sum((i * step for i, step in steps), np.zeros(len(flat), np.int64))


def unit(
    names: tuple[str, ...],
    shape: Sequence[int],
    cut: tuple[int, int, int] | None = None,
) -> Unit:
    """A parameter as a unit, or the part `(axis, index, of how many)` of it."""
    lengths = [int(length) for length in shape]
    steps = tuple(count(lengths[axis + 1 :]) for axis in range(len(lengths)))
    if cut is None:
        return Unit(names, tuple(lengths), steps)
    axis, index, many = cut
    lengths[axis] //= many
    base = index * lengths[axis] * steps[axis]
    return Unit(names, tuple(lengths), steps, base, (index, many))


def offsets_of(view: View, shape: Sequence[int], base: int = 0) -> tuple[Places, ...]:
    """The view's offsets along the axes of a leaf's block; see `views`."""
    along, atoms = [], list(zip(view.lengths, view.steps, strict=True))
    for length in shape:
        offsets = np.zeros(1, np.int64)
        while len(offsets) < length:
            more, step = atoms.pop(0)
            offsets = np.add.outer(offsets, np.arange(more) * step).reshape(-1)
        along.append(offsets[:length])
    if along:
        along[0] = along[0] + base
    return tuple(along)


@lru_cache(maxsize=4096)
def views(
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    steps: tuple[int, ...],
    thorough: bool = False,
) -> tuple[View, ...]:
    """The orders in which a unit fits a block, the plain ones first.

    The axes are permuted, before that split by the lengths of the block's axes; if
    `thorough`, also split in two or three at any divisor (channels after or before
    pixels in a flattened axis, halves or pairs of a rotary embedding), or reversed.
    """
    found: dict[tuple[int, ...], View] = {}
    more = np.concatenate([np.arange(min(4, count(shape))), _spread(count(shape))])
    for tried, view in enumerate(_views(shape, lengths, steps, thorough)):
        if tried >= _MOST:
            break
        fitted = _fitted(view, shape)
        if fitted is not None:
            found.setdefault(tuple(fitted.places(more).tolist()), fitted)
    return tuple(found.values())


def _spread(size: int) -> Places:
    rng = np.random.default_rng(1)
    return rng.integers(0, max(1, size), 64) if size else np.zeros(0, np.int64)


def _views(
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    steps: tuple[int, ...],
    thorough: bool,
) -> Iterator[View]:
    axes = [(n, s) for n, s in zip(lengths, steps, strict=True) if n > 1]
    inner = {n for n in shape if n > 1}
    splits = [_splits(n, inner) for n, _ in axes]
    for lengthened in sorted(
        itertools.product(*splits), key=lambda c: sum(map(len, c))
    ):
        atoms = [
            (n, step * count(parts[i + 1 :]))
            for parts, (_, step) in zip(lengthened, axes, strict=True)
            for i, n in enumerate(parts)
        ]
        if len(atoms) <= 6:
            for chosen in itertools.permutations(atoms):
                yield View(tuple(n for n, _ in chosen), tuple(s for _, s in chosen))
    if not thorough:
        return
    for order in itertools.permutations(axes):
        for at, (n, step) in enumerate(order):
            for a, b, c in _factors(n):
                # Numbered (a, b, c) in the parameter, and (a, c, b) in the leaf.
                middle = [(a, b * c * step), (c, step), (b, c * step)]
                atoms = [*order[:at], *middle, *order[at + 1 :]]
                atoms = [(x, y) for x, y in atoms if x > 1]
                yield View(tuple(x for x, _ in atoms), tuple(y for _, y in atoms))


def _splits(length: int, inner: set[int]) -> list[tuple[int, ...]]:
    """Ways to split an axis by the lengths of the other array's axes."""
    found: dict[tuple[int, ...], None] = {(length,): None}
    for first in sorted(inner):
        if first < length and length % first == 0:
            found[first, length // first] = None
            found[length // first, first] = None
    for three in itertools.permutations(sorted(inner), 3):
        if count(three) == length:
            found[three] = None
    return list(found)


def _factors(length: int) -> Iterator[tuple[int, int, int]]:
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    for a in divisors:
        for b in divisors:
            if length % (a * b) == 0 and 1 < b < length // a:
                yield a, b, length // (a * b)


def _fitted(view: View, shape: tuple[int, ...]) -> View | None:
    """The view with axes that don't cross those of the block; `None` if they must."""
    merged: list[list[int]] = []
    for length, step in zip(view.lengths, view.steps, strict=True):
        if merged and merged[-1][1] == length * step:
            merged[-1] = [merged[-1][0] * length, step]
        else:
            merged.append([length, step])
    wanted = [n for n in shape if n != 1]
    atoms = []
    # Both, from the fastest axis: the shorter one must divide the longer one.
    length = step = 1
    for want in reversed(wanted):
        while want > 1:
            if length == 1:
                length, step = merged.pop()
            both = min(want, length)
            if want % both or length % both:
                return None
            atoms.append((both, step))
            want, length, step = want // both, length // both, step * both
    atoms.reverse()
    return View(tuple(n for n, _ in atoms), tuple(s for _, s in atoms))


def describe(
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    torch_shapes: Mapping[str, tuple[int, ...]],
) -> str:
    """Says for a person how a leaf is made of PyTorch's parameters."""
    texts = list(dict.fromkeys(_one(p, torch_shapes[p.names[0]]) for p in pieces))
    how = texts[0] if len(texts) == 1 else "in parts"
    if len(pieces) == 1 and pieces[0].shape == shape:
        return how
    cut = [axis for axis in range(len(shape)) if pieces[0].shape[axis] < shape[axis]]
    stacked = cut == [0] and pieces[0].shape[0] == 1
    many = f"{len(pieces)} {'stacked' if stacked else 'joined'}"
    along = "" if stacked or len(cut) != 1 else f" along axis {cut[0]}"
    if len(pieces) == 1:
        many = f"rows up to {pieces[0].shape}"
    return f"{many}{along}, each {how}" if how != "as it is" else f"{many}{along}"


def _one(piece: Piece, torch_shape: tuple[int, ...]) -> str:
    text = _order_text(piece, torch_shape)
    size = count(piece.shape)
    if size < count(torch_shape) and size:
        first = sum(int(o[0]) for o in piece.offsets)
        part, rest = divmod(first, size)
        whole, more = divmod(count(torch_shape), size)
        if not rest and not more and _span(piece) == size:
            part_text = f"part {part + 1} of {whole}"
        else:
            part_text = "a part"
        text = part_text if text == "as it is" else f"{part_text}, {text}"
    if len(piece.names) > 1:
        text = "a sum" if text == "as it is" else f"a sum, {text}"
    return text


def _span(piece: Piece) -> int:
    return 1 + sum(int(o.max() - o.min()) for o in piece.offsets)


def _order_text(piece: Piece, torch_shape: tuple[int, ...]) -> str:
    axes = [o for o in piece.offsets if len(o) > 1]
    steps = []
    for offsets in axes:
        apart = np.diff(offsets)
        if not (apart == apart[0]).all() or apart[0] < 0:
            reverse = len(set(apart.tolist())) == 1
            return "reversed" if reverse else "in another order"
        steps.append(int(apart[0]))
    torch_steps = [count(torch_shape[a + 1 :]) for a in range(len(torch_shape))]
    long = [s for s, n in zip(torch_steps, torch_shape, strict=True) if n > 1]
    if steps != sorted(steps, reverse=True):
        if len(steps) == 2 and len(long) == 2:
            return "transposed"
        if sorted(steps) == sorted(long):
            order = [torch_steps.index(s) for s in steps]
            short = [a for a in range(len(torch_shape)) if a not in order]
            return f"axes {tuple(order + short)}"
        return f"axes in another order, reshaped to {piece.shape}"
    return "as it is" if steps == long else f"reshaped to {piece.shape}"
