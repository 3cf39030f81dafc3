"""Minibatches of arrays: which rows each step takes, in order or shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, UInt32

from jaxgrad.placing import Layout, laid, layout_on, split_layout
from jaxgrad.pytrees import PyTree, is_array

# With 6 pairs of rounds the shuffle passes the tests of uniformity in
# tests/test_minibatches.py, down to 5 rows; 4 fail there.
_ROUNDS = 6


class Part(NamedTuple):
    """Rows that are computed together: how many, and the loss's arguments."""

    size: int
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """How arrays are cut into batches; a compiled loop is kept for each such way.

    Attributes:
      count: how many rows there are.
      batch_size: how many a step takes.
      drop_last: whether a last batch of fewer rows is left out.
      axes: per leaf of the arguments the axis of its rows; `None` if it has none.
      layouts: how the batch's leaves are laid over devices.
    """

    count: int
    batch_size: int
    drop_last: bool
    axes: tuple[int | None, ...]
    layouts: tuple[Layout, ...]

    @property
    def full(self) -> int:
        """How many batches of `batch_size` rows an epoch has."""
        return self.count // self.batch_size

    @property
    def short(self) -> int:
        """How many rows the last batch of an epoch has, if it's a short one; else 0."""
        return 0 if self.drop_last else self.count % self.batch_size

    def place(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Which batch of its epoch a step takes."""
        return step % (self.full + (self.short > 0))

    def batch(
        self, args: tuple[Any, ...], step: Int[Array, ""], size: int, key: Any
    ) -> list[Part]:
        """The batch of a step, in parts of which each divides evenly over devices."""
        places = (self.place(step) * self.batch_size).astype(jnp.uint32)
        places += jnp.arange(size, dtype=jnp.uint32)
        if key is not None:
            epoch = step // (self.full + (self.short > 0))
            places = shuffled(places, jax.random.fold_in(key, epoch), self.count)
        parts, start = [], 0
        for some in even_parts(size, devices_of_rows(self.axes, self.layouts)):
            chosen = places[start : start + some]
            parts.append(Part(some, self._taken(args, chosen)))
            start += some
        return parts

    def _taken(
        self, args: tuple[Any, ...], places: UInt32[Array, " rows"]
    ) -> tuple[Any, ...]:
        leaves, treedef = jax.tree.flatten(args)
        taken = [
            leaf if axis is None else _take(leaf, axis, places, layout)
            for leaf, axis, layout in zip(leaves, self.axes, self.layouts, strict=True)
        ]
        return jax.tree.unflatten(treedef, taken)  # type: ignore[no-any-return]


def _take(leaf: Any, axis: int, places: Any, layout: Layout) -> Array:
    if layout is not None and places.size % _split(layout, axis):
        layout = whole_rows(layout, axis)
    at = jnp.asarray(leaf).at[(slice(None),) * axis + (places,)]
    explicit = None if layout is None else split_layout(layout)[0]
    rows = at.get(mode="promise_in_bounds", out_sharding=explicit)
    return laid(rows, layout)  # type: ignore[no-any-return]


def _split(layout: NamedSharding, axis: int) -> int:
    """Over how many devices a layout splits an axis."""
    names = layout.spec[axis] if axis < len(layout.spec) else None
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(layout.mesh.shape[name] for name in names if name is not None)


def whole_rows(layout: NamedSharding, axis: int) -> NamedSharding:
    """The layout with nothing split along an axis."""
    spec = [None if place == axis else name for place, name in enumerate(layout.spec)]
    return layout_on(layout.mesh, *spec)


def per_leaf(prefix: PyTree, tree: PyTree, name: str) -> list[Any]:
    """A pytree prefix, as `vmap`'s `in_axes`, spread over a tree's leaves.

    Raises:
      ValueError: the prefix hasn't the tree's structure.
    """
    prefix = tuple(prefix) if isinstance(prefix, list) else prefix
    try:
        spread = jax.tree.map(
            lambda value, part: _Same([value] * len(jax.tree.leaves(part))),
            prefix,
            tree,
            is_leaf=lambda value: value is None,
        )
    except ValueError:
        raise ValueError(
            f"{name} isn't a prefix of the loss's arguments after params, as vmap's "
            "in_axes is: one value for all, or a tuple with one for each. It is "
            f"{prefix!r:.200}, and they are {jax.tree.structure(tree)!s:.200}."
        ) from None
    return [x for part in jax.tree.leaves(spread) for x in part]


class _Same(list):  # type: ignore[type-arg]
    """A value for each leaf of a part; itself a leaf, which a plain list isn't."""


def layouts_per_leaf(prefix: PyTree, tree: PyTree) -> list[Layout]:
    """`batch_sharding`, spread over a tree's leaves.

    Raises:
      TypeError: it isn't of `NamedSharding`s.
      ValueError: it hasn't the tree's structure.
    """
    layouts = per_leaf(prefix, tree, "batch_sharding")
    for layout in layouts:
        if not (layout is None or isinstance(layout, NamedSharding)):
            raise TypeError(
                "batch_sharding must be a jax.sharding.NamedSharding, which has a "
                'mesh, such as `NamedSharding(mesh, PartitionSpec("data"))`, and is '
                f"{layout!r}."
            )
    return layouts


def count_rows(
    named: Sequence[tuple[str, Any]], axes: Sequence[int | None]
) -> tuple[int | None, tuple[int | None, ...]]:
    """How many rows arrays have, and the axis of each; `None` for what has none.

    Raises:
      ValueError: an array has no such axis, or another number of rows.
    """
    counts: dict[str, int] = {}
    found: list[int | None] = []
    for (name, leaf), axis in zip(named, axes, strict=True):
        own = None
        if axis is not None and is_array(leaf):
            if not -leaf.ndim <= axis < leaf.ndim:
                raise ValueError(
                    f"`{name}` has shape {leaf.shape}, and so no axis {axis} of rows. "
                    "Give batch_axes with None for what has no rows, as vmap's "
                    "in_axes: `batch_axes=(0, 0, None)`."
                )
            own = axis % leaf.ndim
            counts[name] = leaf.shape[own]
        found.append(own)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"`{name}` has {count}" for name, count in counts.items())
        raise ValueError(
            f"The arrays have different numbers of rows: {told}. Give batch_axes with "
            "the axis of the rows of each, and None for what has none."
        )
    return next(iter(counts.values()), None), tuple(found)


def uneven(what: str, size: int, devices: int) -> str:
    """Says that rows don't divide over devices, and what to do."""
    near = sorted({size - size % devices, size - size % devices + devices} - {0})
    return (
        f"{what} has {size} rows, which don't divide over the {devices} devices that "
        f"they are split over. Make it {' or '.join(map(str, near))} rows; or, if the "
        'loss is a mean over rows, say reduction="mean": then the rows left over are '
        "computed apart, on every device, and both parts weighted."
    )


def devices_of_rows(axes: Sequence[int | None], layouts: Sequence[Layout]) -> int:
    """Over how many devices the rows are split; a batch's rows should divide by it."""
    both = zip(axes, layouts, strict=True)
    return math.lcm(*(_split(x, axis) for axis, x in both if x and axis is not None))


def even_parts(size: int, devices: int) -> list[int]:
    """A number of rows as one that divides over devices, and the rest."""
    rest = size % devices
    return [part for part in (size - rest, rest) if part]


def shuffled(
    places: UInt32[Array, " rows"], key: Any, count: int
) -> UInt32[Array, " rows"]:
    r"""Where a random permutation of `0, ..., count - 1` takes some places.

    Computed for these places alone: no array of all rows is made or sorted, which on a
    CPU would take as long as the epoch. A place is written as two digits
    $(h, l) \in Z_a \times Z_b$ with $a b \ge n$, and each round adds to one of them a
    hash of the other, which can be undone, so that no two places meet; what lands at
    $n$ or beyond goes round again.

    Source: Black and Rogaway, Ciphers with arbitrary finite domains (2002), methods 2
    and 3, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf.
    """
    side = math.isqrt(count - 1) + 1 if count > 1 else 1
    left, right = jnp.uint32(side), jnp.uint32(-(-count // side))
    keys = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)

    def once(place: Any) -> Any:
        high, low = place // right, place % right
        for first, second in keys:
            high = (high + _hash(low ^ first) % left) % left
            low = (low + _hash(high ^ second) % right) % right
        return high * right + low

    return jax.lax.while_loop(  # type: ignore[no-any-return]
        lambda place: jnp.any(place >= count),
        lambda place: jnp.where(place < count, place, once(place)),
        once(places),
    )


def _hash(x: Any) -> Any:
    """MurmurHash3's last step: each bit of the input flips each of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
