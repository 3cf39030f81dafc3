"""Which axis of each argument counts its rows, and how many devices these are over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxgrad.placing import Layout, layout_on
from jaxgrad.pytrees import PyTree, is_array


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
    return math.lcm(
        *(devices_along(x, axis) for axis, x in both if x and axis is not None)
    )


def even_parts(size: int, devices: int) -> list[int]:
    """A number of rows as one that divides over devices, and the rest."""
    rest = size % devices
    return [part for part in (size - rest, rest) if part]


def devices_along(layout: NamedSharding, axis: int) -> int:
    """Over how many devices a layout splits an axis."""
    names = layout.spec[axis] if axis < len(layout.spec) else None
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(layout.mesh.shape[name] for name in names if name is not None)


def whole_rows(layout: NamedSharding, axis: int) -> NamedSharding:
    """The layout with nothing split along an axis."""
    spec = [None if place == axis else name for place, name in enumerate(layout.spec)]
    return layout_on(layout.mesh, *spec)
