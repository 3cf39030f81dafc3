"""Batches from an iterable: looked through one by one, and laid on the devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad.placing import (
    Layout,
    check_devices,
    layout_of,
    put_together,
    several_devices,
    spans_processes,
)
from jaxgrad.pytrees import PyTree, is_array, kind_of, leaf_name
from jaxgrad.training.axes import (
    count_rows,
    devices_of_rows,
    even_parts,
    layouts_per_leaf,
    per_leaf,
    uneven,
    whole_rows,
)
from jaxgrad.training.rows import Part


class Trouble(Exception):
    """What is wrong with the batches; becomes a `BatchError` with the run so far."""


@dataclass(frozen=True)
class Laying:
    """How batches are looked through and laid.

    Attributes:
      before: how many arguments the loss has before a batch's.
      axes: a prefix of the batch, with the axis of the rows.
      layout: a prefix of the batch, with the layouts of its arrays; or `None`.
      like: arrays to whose devices go those without a layout, with their names.
      drop_last: whether a batch of fewer rows than the first is left out.
      weighted: whether rows that don't divide over the devices are a part of their own.
      several: whether the arrays span processes, of which each gives its own rows.
    """

    before: int
    axes: PyTree
    layout: PyTree
    like: list[tuple[str, Any]]
    drop_last: bool
    weighted: bool
    several: bool

    def names(self, batch: tuple[Any, ...]) -> list[tuple[str, Any]]:
        """A batch's leaves with their names among the loss's arguments."""
        return [
            (leaf_name(path[1:], f"args[{self.before + path[0].idx}]"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        ]


class Ready(NamedTuple):
    """A batch on its devices: its parts, how many rows it has, and its shapes."""

    name: str
    parts: list[Part]
    rows: int
    shapes: dict[str, tuple[int, ...]]


def ready_batches(batches: Iterable[Any], laying: Laying) -> Iterator[Ready]:
    """The batches, each on its devices.

    Raises:
      Trouble: the iterable raises, or a batch isn't like the first one, can't be
        taken, or doesn't divide over the devices.
    """
    stock = iter(batches)
    first: Like | None = None
    most = 0
    for place in itertools.count():
        name = f"batches[{place}]"
        try:
            batch = next(stock)
        except StopIteration:
            return
        except Exception as error:
            raise Trouble(
                f"the iterable raised {type(error).__name__} where {name} was due: "
                f"{error}"
            ) from error
        batch = _arrays(name, batch)
        like = _like(laying, name, batch)
        if first is None:
            first = like
            laying = replace(laying, like=[*laying.like, *_where(laying, name, batch)])
        _compare(first, like)
        ready = _laid(laying, name, batch, most)
        del batch
        if ready is not None:
            most = max(most, ready.rows)
            yield ready


def _arrays(name: str, batch: Any) -> tuple[Any, ...]:
    """The batch as a tuple; arrays of NumPy and others are copied into new ones.

    Its reader may fill the same buffer again while the step is still to be computed.
    """
    if not isinstance(batch, tuple | list):
        raise Trouble(
            f"{name} is a {type(batch).__name__}; a tuple of the loss's arguments was "
            "expected: (x, y), or (x,) if there is one"
        )
    try:
        return tuple(
            jax.tree.map(
                lambda x: np.array(np.asarray(x)) if _is_host(x) else x, list(batch)
            )
        )
    except Exception as error:
        raise Trouble(
            f"{name} has an array that NumPy can't take: {error} (of a PyTorch tensor "
            "that requires a gradient give `.detach()`, of a bfloat16 one `.float()`)"
        ) from error


def _is_host(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or kind_of(leaf) == "foreign"


class Like(NamedTuple):
    """What must be the same in each batch: its leaves, in words, and its structure."""

    name: str
    leaves: dict[str, str]
    structure: str


def _like(laying: Laying, name: str, batch: tuple[Any, ...]) -> Like:
    leaves = {leaf: _words(x) for leaf, x in laying.names(batch)}
    return Like(name, leaves, str(jax.tree.structure(batch)))


def _where(laying: Laying, name: str, batch: Any) -> list[tuple[str, Any]]:
    """Something small on the devices of a batch, for the later ones to be beside."""
    if not several_devices():
        return []
    return [
        (f"{leaf} of {name}", put_together(np.zeros(()), x))
        for leaf, x in laying.names(batch)[:1]
    ]


def _compare(first: Like, now: Like) -> None:
    """Says in what a batch differs from the first, but for the lengths of axes."""
    for leaf in [*first.leaves, *now.leaves]:
        old, new = (like.leaves.get(leaf, "absent") for like in (first, now))
        if old != new:
            raise Trouble(
                f"{now.name} isn't like {first.name}: leaf `{leaf}` is {new}, and was "
                f"{old}"
            )
    if first.structure != now.structure:
        raise Trouble(
            f"{now.name} isn't like {first.name}: its structure is {now.structure}, "
            f"and was {first.structure}"
        )


def _words(leaf: Any) -> str:
    if not is_array(leaf):
        return f"a {type(leaf).__name__}"
    return f"an array of {leaf.dtype} with {leaf.ndim} axes"


def _laid(laying: Laying, name: str, batch: tuple[Any, ...], most: int) -> Ready | None:
    """A batch on its devices, in parts whose rows divide over them.

    `None` if it's left out, since it has fewer rows than the `most` that one had.
    """
    named = laying.names(batch)
    try:
        check_devices([*laying.like, *named])
    except ValueError as error:
        raise Trouble(f"{name}: {error}") from error
    shapes = {leaf: x.shape for leaf, x in named if is_array(x)}
    if laying.layout is None and not (laying.drop_last or laying.several):
        return Ready(name, [Part(1, put_together(batch, laying.like))], 0, shapes)
    try:
        axes = per_leaf(laying.axes, batch, "batch_axes")
        layouts = layouts_per_leaf(laying.layout, batch)
        count, found = count_rows(named, axes)
    except (TypeError, ValueError) as error:
        raise Trouble(f"{name}: {error}") from error
    for (leaf, x), axis, layout in zip(named, found, layouts, strict=True):
        if laying.several and axis is not None and not (layout or spans_processes(x)):
            raise Trouble(
                f"{name}: `{leaf}` has rows of this process alone. Say batch_sharding, "
                "how the rows of all processes lie together, or batch_axes with None "
                "for what is the same in all"
            )
    if laying.drop_last and (count or 0) < most:
        return None
    if count == 0:
        raise Trouble(f"{name} has no rows")
    count = 1 if count is None else count
    devices = devices_of_rows(found, layouts)
    sizes = even_parts(count, devices)
    if laying.several:  # together they must divide
        devices //= np.gcd(devices, jax.process_count())
        sizes = [count]
    if any(size % devices for size in sizes) and (
        laying.several or not laying.weighted
    ):
        raise Trouble(uneven(name, count, devices))
    leaves, treedef = jax.tree.flatten(batch)
    parts, start = [], 0
    for size in sizes:
        lay = _lay_rows(slice(start, start + size), size % devices > 0, laying.several)
        part = jax.tree.unflatten(treedef, map(lay, leaves, found, layouts))
        parts.append(Part(size, put_together(part, laying.like)))
        start += size
    return Ready(name, parts, count, shapes)


def _lay_rows(rows: slice, odd: bool, several: bool) -> Callable[..., Any]:
    """Cuts rows out of an array and lays them; on all devices whole, if they're odd."""

    def lay(leaf: Any, axis: int | None, layout: Layout) -> Any:
        if not is_array(leaf):
            return leaf
        if axis is not None and rows != slice(0, leaf.shape[axis]):
            leaf = leaf[(slice(None),) * axis + (rows,)]
        if layout is None or layout_of(leaf):
            return leaf
        if several:
            local = np.asarray(leaf)
            return jax.make_array_from_process_local_data(layout, local)  # type: ignore[no-untyped-call]
        if axis is not None and odd:
            layout = whole_rows(layout, axis)
        return jax.device_put(leaf, layout)

    return lay
