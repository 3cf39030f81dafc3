"""Minibatches of arrays: which rows each step takes, in order or shuffled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from jaxgrad.placing import Layout, laid, split_layout
from jaxgrad.training.axes import (
    devices_along,
    devices_of_rows,
    even_parts,
    whole_rows,
)

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

    @property
    def per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self.full + (self.short > 0)

    def place(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Which batch of its epoch a step takes."""
        return step % self.per_epoch

    def batch(
        self, args: tuple[Any, ...], step: Int[Array, ""], size: int, key: Any
    ) -> list[Part]:
        """The batch of a step, in parts of which each divides evenly over devices."""
        places = (self.place(step) * self.batch_size).astype(jnp.uint32)
        places += jnp.arange(size, dtype=jnp.uint32)
        if key is not None:
            key = jax.random.fold_in(key, step // self.per_epoch)
            places = shuffled(places, key, self.count)
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
    if layout is not None and places.size % devices_along(layout, axis):
        layout = whole_rows(layout, axis)
    at = jnp.asarray(leaf).at[(slice(None),) * axis + (places,)]
    explicit = None if layout is None else split_layout(layout)[0]
    rows = at.get(mode="promise_in_bounds", out_sharding=explicit)
    return laid(rows, layout)  # type: ignore[no-any-return]


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
