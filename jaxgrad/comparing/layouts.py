"""How a JAX leaf is made of PyTorch's parameters: a linear map, and its transpose.

A leaf is covered by pieces. A piece is a block of the leaf whose numbers stand in one
PyTorch parameter (or are the sum of several), in an order that is separable: along each
axis of the block there is a list of offsets into the flat parameter, which add up.
Permuted, reshaped, split, concatenated, stacked, reordered and shared parameters all
are of this form, and so are convolution kernels, fused projections and gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# So many numbers are gathered at a time, so that their places take little memory.
_AT_ONCE = 1 << 20


class Piece(NamedTuple):
    """A block of a leaf, and where its numbers stand.

    Attributes:
      names: the PyTorch parameters whose numbers are added; one, unless it's a sum.
      start: the block's first index in the leaf, per axis.
      offsets: per axis of the leaf, what each of the block's indices adds to the place
        in the flat parameter. Its lengths are the block's shape. A scalar has none.
    """

    names: tuple[str, ...]
    start: tuple[int, ...]
    offsets: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape."""
        return tuple(len(along) for along in self.offsets)

    @property
    def block(self) -> tuple[slice, ...]:
        """The block in the leaf, as an index."""
        both = zip(self.start, self.shape, strict=True)
        return tuple(slice(first, first + count) for first, count in both)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the numbers of a leaf come from.

    Attributes:
      path: the leaf's path.
      shape: its shape.
      pieces: what covers it; they don't overlap.
      text: for a person: `as it is`, `transposed`, `axes (2, 3, 1, 0)`.
      transform: the user's own function from PyTorch's array to JAX's, where it is more
        than a rearrangement; the only piece then says which parameter it's applied to.
    """

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    text: str
    transform: Callable[[Any], Any] | None = None


def whole(
    path: str,
    shape: Sequence[int],
    name: str,
    torch_shape: Sequence[int],
    axes: Sequence[int],
) -> Layout | None:
    """A leaf that is one parameter, with its axes in another order, and reshaped.

    `None` if that isn't separable: a reshape that mixes axes.
    """
    mixed = [torch_shape[axis] for axis in axes]
    steps = _steps(torch_shape)
    mixed_steps = np.array([steps[axis] for axis in axes], np.int64)

    def places(flat: Array) -> Array:
        if not mixed:
            return np.zeros(len(flat), np.int64)
        return mixed_steps @ np.stack(np.unravel_index(flat, mixed))

    leaf_steps = _steps(shape)
    offsets = tuple(
        places(np.arange(count, dtype=np.int64) * step)
        for count, step in zip(shape, leaf_steps, strict=True)
    )
    # The corners, and some more, tell if the places are sums of those along the axes.
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    some = np.concatenate([[0, size - 1], rng.integers(0, size, 1000)])
    index = np.unravel_index(some, tuple(shape)) if shape else ()
    sums = sum((o[i] for o, i in zip(offsets, index, strict=True)), np.int64(0))
    if not (places(some) == sums).all():
        return None
    piece = Piece((name,), (0,) * len(shape), offsets)
    return Layout(path, tuple(shape), (piece,), layout_text(torch_shape, axes, shape))


def _steps(shape: Sequence[int]) -> list[int]:
    """How far apart in memory an index's neighbours are, per axis, in entries."""
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def piece_of(name: str, places: Array) -> Piece | None:
    """The piece of a leaf whose numbers stand at some places of the flat parameter.

    `None` where the places aren't separable.
    """
    origin = (0,) * places.ndim
    offsets = []
    for axis in range(places.ndim):
        line: Any = (*origin[:axis], slice(None), *origin[axis + 1 :])
        along = places[line] - places[origin] if places.size else places[line]
        offsets.append(along.astype(np.int64))
    if not places.size:
        return Piece((name,), origin, tuple(offsets))
    if offsets:
        offsets[0] = offsets[0] + places[origin]
    piece = Piece((name,), origin, tuple(offsets))
    for rows, index in _chunks(piece):
        if not np.array_equal(index, places[rows] if offsets else places):
            return None
    return piece


def layout_text(
    torch_shape: Sequence[int], axes: Sequence[int], shape: Sequence[int]
) -> str:
    """Says how a parameter's axes are laid out in a leaf."""
    mixed = tuple(torch_shape[axis] for axis in axes)
    long = [axis for axis in axes if torch_shape[axis] > 1]
    text = "as it is"
    if long != sorted(long):
        text = "transposed" if len(axes) == 2 else f"axes {tuple(axes)}"
    if mixed != tuple(shape):
        reshaped = f"reshaped to {tuple(shape)}"
        text = reshaped if text == "as it is" else f"{text}, {reshaped}"
    return text


def laid_out(layout: Layout, arrays: Mapping[str, Array]) -> Array:
    """The leaf, of PyTorch's arrays."""
    if layout.transform is not None:
        (piece,) = layout.pieces
        return np.asarray(layout.transform(arrays[piece.names[0]]))
    dtype = arrays[layout.pieces[0].names[0]].dtype
    leaf = np.zeros(layout.shape, dtype)
    for piece in layout.pieces:
        leaf[piece.block] = gathered(piece, arrays)
    return leaf


def gathered(piece: Piece, arrays: Mapping[str, Array]) -> Array:
    """The piece's block, of PyTorch's arrays: a view of the parameter, if it can be."""
    first, *others = (_taken(piece, arrays[name]) for name in piece.names)
    for other in others:
        first = first + other
    return first


def put_back(piece: Piece, block: Array, into: dict[str, Array]) -> None:
    """Adds a block to PyTorch's arrays, where its numbers stand: the transpose.

    The arrays of `into` are changed; they are contiguous.
    """
    for name in piece.names:
        flat = into[name].reshape(-1)
        view = _strided(piece, flat)
        if view is not None:
            view += block
            continue
        for rows, index in _chunks(piece):
            flat[index] += block[rows]


def _taken(piece: Piece, array: Array) -> Array:
    flat = array.reshape(-1)
    view = _strided(piece, flat)
    if view is not None:
        return view
    block = np.empty(piece.shape, array.dtype)
    for rows, index in _chunks(piece):
        block[rows] = flat[index]
    return block


def _strided(piece: Piece, flat: Array) -> Array | None:
    """The block as a view of the flat parameter, where each axis has one stride."""
    if not piece.offsets:
        return flat.reshape(())
    if 0 in piece.shape:
        return None
    strides = []
    for along in piece.offsets:
        steps = np.diff(along)
        if len(steps) and not (steps == steps[0]).all():
            return None
        strides.append(int(steps[0]) * flat.itemsize if len(steps) else 0)
    first = sum(int(along[0]) for along in piece.offsets)
    return np.lib.stride_tricks.as_strided(flat[first:], piece.shape, strides)


def _chunks(piece: Piece) -> Any:
    """Rows of the block, and the places of their numbers, a few rows at a time."""
    if not piece.offsets:
        yield ..., np.zeros((), np.int64)
        return
    head, *rest = piece.offsets
    inner = np.zeros((), np.int64)
    for along in rest:
        inner = np.add.outer(inner, along)
    step = max(1, _AT_ONCE // max(1, inner.size))
    for first in range(0, len(head), step):
        rows = slice(first, first + step)
        yield rows, np.add.outer(head[rows], inner)
