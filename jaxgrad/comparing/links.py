"""Pairs gradients of JAX leaves with those of PyTorch's parameters, and measures them.

PyTorch's gradient is the transpose of the layout applied to JAX's. Where each number of
a parameter stands once in JAX, that is a comparison entry by entry, in JAX's layout;
where it stands in several leaves (tied weights), their gradients are added first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Layout, Piece, gathered, put_back
from jaxgrad.comparing.report import Entry

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Link:
    """A leaf, or what of it comes from one parameter.

    Attributes:
      path: the leaf's path; several that share the parameter, joined by ` + `.
      name: the parameter's name.
      text: how it is laid out.
      layouts: the leaf's layout; several if they share.
      pieces: those of the leaf that take from the parameter.
      added: whether gradients are to be added, in PyTorch's layout.
      torch_shape: the parameter's shape.
      free: whether all of its numbers are equal, so that any order of them fits.
      others: the leaf's other layouts, where its numbers fit in them too.
    """

    path: str
    name: str
    text: str
    layouts: tuple[Layout, ...]
    pieces: tuple[Piece, ...]
    added: bool
    torch_shape: tuple[int, ...]
    free: bool = False
    others: tuple[Layout, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers the parameter has."""
        return int(np.prod(self.torch_shape))


class Measure(NamedTuple):
    """How far two arrays are apart.

    Attributes:
      max_error: the largest difference of two entries.
      off: the norm of the difference.
      ours: the norm of JAX's.
      theirs: the norm of PyTorch's.
      cosine: of the angle between the two.
      worst: the entry that differs most.
      finite: whether all entries are finite.
    """

    max_error: float
    off: float
    ours: float
    theirs: float
    cosine: float
    worst: Entry | None
    finite: bool

    @property
    def relative(self) -> float:
        """The norm of the difference over that of PyTorch's, or else of JAX's."""
        return self.off / (self.theirs or self.ours or 1.0)

    @property
    def ulps(self) -> float:
        """The worst difference in units in the last place of float32."""
        if self.worst is None or not np.isfinite(self.worst.torch):
            return 0.0
        return self.max_error / float(np.spacing(np.float32(abs(self.worst.torch))))


def opened(
    links: Sequence[Link],
    leaves: Mapping[str, Array],
    others: Mapping[str, Sequence[Layout]],
) -> list[Link]:
    """The links, with what their contents leave open."""

    def plain(link: Link) -> bool:
        blocks = [np.asarray(leaves[link.path][p.block]) for p in link.pieces]
        flat = [b.ravel() for b in blocks if b.size]
        return bool(flat) and all((b == flat[0][0]).all() for b in flat)

    return [
        link
        if link.added
        else replace(link, free=plain(link), others=tuple(others.get(link.path, ())))
        for link in links
    ]


def links_of(
    layouts: Sequence[Layout], shapes: Mapping[str, tuple[int, ...]]
) -> list[Link]:
    """What to compare, in the order of the leaves."""
    taken: dict[str, int] = {}
    users: dict[str, list[Layout]] = {}
    for layout in layouts:
        for piece in layout.pieces:
            for name in piece.names:
                taken[name] = taken.get(name, 0) + int(np.prod(piece.shape))
                users.setdefault(name, [])
                if layout not in users[name]:
                    users[name].append(layout)
    links: list[Link] = []
    done: set[str] = set()
    for layout in layouts:
        names = dict.fromkeys(n for piece in layout.pieces for n in piece.names)
        for name in names:
            own = tuple(p for p in layout.pieces if name in p.names)
            shared = (
                taken[name] > int(np.prod(shapes[name])) and layout.transform is None
            )
            if shared and name in done:
                continue
            if shared:
                done.add(name)
                several = tuple(users[name])
                path = " + ".join(part.path for part in several)
                links.append(
                    Link(path, name, "shared", several, (), True, shapes[name])
                )
                continue
            text = _part_text(layout, name, own, len(names))
            added = layout.transform is not None
            links.append(
                Link(layout.path, name, text, (layout,), own, added, shapes[name])
            )
    return links


def _part_text(layout: Layout, name: str, pieces: tuple[Piece, ...], names: int) -> str:
    if names == 1 or len(pieces) > 1:
        return layout.text
    (piece,) = pieces
    if len(piece.names) > 1:
        return layout.text
    where = [
        f"{first}:{first + count}" if count < whole else ":"
        for first, count, whole in zip(
            piece.start, piece.shape, layout.shape, strict=True
        )
    ]
    while where and where[-1] == ":":
        where.pop()
    if not where:
        return layout.text
    steps = [int(along[1] - along[0]) for along in piece.offsets if len(along) > 1]
    turned = ", transposed" if steps != sorted(steps, reverse=True) else ""
    return f"[{', '.join(where)}]{turned}"


def measured(
    link: Link,
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
) -> Measure:
    """Compares a link's gradients: `ours` by leaf, `theirs` by parameter.

    Where the contents leave the order of the numbers open, in the order in which the
    gradients agree, if there is one: the loss is the same in any.
    """
    measure = _compared(_pairs(link, ours, theirs))
    if not measure.off > _OPEN * measure.theirs:
        return measure
    for other in link.others:
        turned = replace(link, layouts=(other,), pieces=other.pieces, others=())
        again = measured(turned, ours, theirs)
        if again.off < _BETTER * measure.off:
            return again
    if link.free and not link.added:
        blocks = [(a.ravel(), b.ravel()) for _, a, b in _pairs(link, ours, theirs)]
        mine, other_ = (np.sort(np.concatenate(x)) for x in zip(*blocks, strict=True))
        again = _compared([((0,), mine, other_)])
        if again.off < _BETTER * measure.off:
            return again
    return measure


def _compared(pairs: Iterable[tuple[tuple[int, ...], Array, Array]]) -> Measure:
    total = _Total()
    for first, mine, other in pairs:
        total.add(first, mine, other)
    return total.measure()


# Gradients that differ by more than this are looked at in another order, if the order
# is open, and taken in it if that leaves less than this share of the difference.
_OPEN, _BETTER = 1e-6, 1e-2


def _pairs(
    link: Link, ours: Mapping[str, Array], theirs: Mapping[str, Array]
) -> Iterator[tuple[tuple[int, ...], Array, Array]]:
    """Blocks to compare, and where the first entry of each stands."""
    if link.added:
        both = added(link, ours, theirs[link.name].shape)
        yield (0,) * both.ndim, both, theirs[link.name]
        return
    for piece in link.pieces:
        alone = piece._replace(names=(link.name,))
        mine = np.asarray(ours[link.path][piece.block])
        yield piece.start, mine, gathered(alone, theirs)


def sampled(link: Link, most: int = 1 << 16) -> Link:
    """The link with only the first rows of its first piece, if it's large."""
    piece = link.pieces[0] if link.pieces else None
    if link.added or piece is None or not piece.offsets or link.size <= most:
        return link
    head, *rest = piece.offsets
    rows = max(1, most // max(1, int(np.prod([len(along) for along in rest]))))
    few = piece._replace(offsets=(head[:rows], *rest))
    return replace(link, pieces=(few,), others=(), free=False)


def added(link: Link, ours: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    """JAX's gradients, laid back and added in the parameter's layout."""
    dtype = ours[link.layouts[0].path].dtype
    into = {link.name: np.zeros(shape, dtype)}
    for layout in link.layouts:
        if layout.transform is not None:
            return _through(layout, ours[layout.path], shape)
        for piece in layout.pieces:
            if link.name in piece.names:
                alone = piece._replace(names=(link.name,))
                block = np.asarray(ours[layout.path][piece.block])
                put_back(alone, block, into)
    return into[link.name]


def _through(layout: Layout, gradient: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of the user's own function, applied to a leaf's gradient."""
    import jax
    import jax.numpy as jnp

    assert layout.transform is not None
    with jax.enable_x64(gradient.dtype == np.float64):
        example = jnp.zeros(shape, gradient.dtype)
        _, pull = jax.vjp(layout.transform, example)
        return np.asarray(pull(jnp.asarray(gradient))[0])


class _Total:
    """Sums over blocks, a few rows at a time, so that they stay in the cache."""

    _AT_ONCE = 1 << 16

    def __init__(self) -> None:
        self.off = self.ours = self.theirs = self.dot = 0.0
        self.max_error = -1.0
        self.worst: Entry | None = None
        self.finite = True

    def add(self, first: tuple[int, ...], mine: Array, other: Array) -> None:
        """Adds a block whose first entry stands at `first`."""
        if not mine.size:
            return
        if mine.ndim == 0:
            self._rows(first, mine.reshape(1), other.reshape(1), scalar=True)
            return
        step = max(1, self._AT_ONCE // max(1, mine.size // len(mine)))
        for row in range(0, len(mine), step):
            start = (first[0] + row, *first[1:])
            self._rows(start, mine[row : row + step], other[row : row + step])

    def _rows(
        self, first: tuple[int, ...], mine: Array, other: Array, scalar: bool = False
    ) -> None:
        mine, other = (
            np.asarray(x).astype(np.float64, copy=False) for x in (mine, other)
        )
        with np.errstate(invalid="ignore", over="ignore"):
            off = mine - other
            squares = [
                float(np.vdot(a, b))
                for a, b in ((off, off), (mine, mine), (other, other), (mine, other))
            ]
        self.off += squares[0]
        self.ours += squares[1]
        self.theirs += squares[2]
        self.dot += squares[3]
        if not np.isfinite(squares[1] + squares[2]):
            self.finite &= bool(np.isfinite(mine).all() and np.isfinite(other).all())
        # If there is a NaN, both of these find it.
        ends = off.argmax(), off.argmin()
        place = int(max(ends, key=lambda at: abs(float(off.flat[at]))))
        if not abs(off.flat[place]) <= self.max_error:
            self.max_error = float(abs(off.flat[place]))
            index = np.unravel_index(place, off.shape)
            at = () if scalar else tuple(
                int(i) + f for i, f in zip(index, first, strict=True)
            )  # fmt: skip
            self.worst = Entry(at, float(mine.flat[place]), float(other.flat[place]))

    def measure(self) -> Measure:
        """What was found."""
        ours, theirs = self.ours**0.5, self.theirs**0.5
        cosine = (
            self.dot / (ours * theirs) if ours and theirs else float(ours == theirs)
        )
        return Measure(
            max(self.max_error, 0.0), self.off**0.5, ours, theirs, cosine, self.worst,
            self.finite,
        )  # fmt: skip
