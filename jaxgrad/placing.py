"""Where arrays are: the layouts of leaves over many devices, and how they're kept."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any
Layout = NamedSharding | None
"""How an array is laid over the devices of a mesh; `None`: on one, or not known."""


def layout_of(leaf: Any) -> Layout:
    """The layout of an array that is on several devices; `None` while tracing."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            return sharding
    return None


@functools.cache
def several_devices() -> bool:
    """Whether there is more than one device, so that a layout is worth a look."""
    return jax.device_count() > 1


def layouts_of(tree: PyTree) -> tuple[Layout, ...]:
    """The layouts of a tree's leaves."""
    if not several_devices():
        return (None,) * len(jax.tree.leaves(tree))
    return tuple(map(layout_of, jax.tree.leaves(tree)))


def keep(tree: PyTree, layouts: tuple[Layout, ...], apart: bool = False) -> PyTree:
    """Inside a compiled function: the tree, with its leaves in these layouts.

    `apart`: each leaf is finished before it is laid, as `writes_one` asks.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if apart:
        whole = [x and layout_on(x.mesh) for x in layouts]
        leaves = list(map(laid, leaves, whole))
        leaves = jax.lax.optimization_barrier(leaves)  # type: ignore[no-untyped-call]
    return jax.tree.unflatten(treedef, map(laid, leaves, layouts))


def writes_one(jaxpr: Any) -> bool:
    """Whether equations write one entry or row into an array, as `x.at[3].set(0)`.

    Where the array is a sum over devices of which each then keeps a part, XLA (seen in
    jaxlib 0.10.2 on CPUs) has the devices that don't hold the entry overwrite another
    one: it takes an index beyond the part for one within. Nothing is written wrongly
    where the sum is finished first.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith("scatter"):
            places = eqn.invars[1].aval.shape[:-1]  # the last axis is an index
            if math.prod(places) == 1:
                return True
        values = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        inner = (getattr(x, "jaxpr", x) for x in values if _is_jaxpr(x))
        if any(map(writes_one, inner)):
            return True
    return False


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def laid(leaf: Any, layout: Layout) -> Any:
    """Inside a compiled function: an array, in this layout if there is one."""
    if layout is None:
        return leaf
    explicit, auto = split_layout(layout)
    if explicit is not None:
        leaf = jax.sharding.reshard(leaf, explicit)  # type: ignore[no-untyped-call]
    if auto is None:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, auto)  # type: ignore[no-untyped-call]


def split_layout(layout: NamedSharding) -> tuple[Layout, Layout]:
    """A layout's part on the mesh's explicit axes, and that on its others.

    JAX asks for the two in different ways. `None` if the mesh has no such axes.
    """
    kinds = dict(zip(layout.mesh.axis_names, layout.mesh.axis_types, strict=True))

    def part(explicit: bool) -> Layout:
        mine = {n for n, t in kinds.items() if (t == AxisType.Explicit) == explicit}
        rows = [
            names if isinstance(names, tuple) else (names,) for names in layout.spec
        ]
        kept = [tuple(n for n in names if n in mine) or None for names in rows]
        return layout_on(layout.mesh, *kept) if mine else None

    return part(True), part(False)


def layout_on(mesh: Any, *axes: Any) -> NamedSharding:
    """A layout over a mesh; on all devices whole, without axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]


def automatic(layout: NamedSharding) -> NamedSharding:
    """The same layout on a mesh without explicit axes, for programs of ours.

    Explicit axes refuse what has no layout of its own.
    """
    mesh = layout.mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == kinds:
        return layout
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return layout_on(mesh, *layout.spec)


def seen_as(array: Any, layout: NamedSharding) -> Any:
    """The same buffers under another name for the same layout."""
    if array.sharding == layout:
        return array
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, layout, parts)


def handed_out(numbers: np.ndarray, layout: NamedSharding) -> Any:
    """Numbers that each process has, in their dtype: each device gets its part.

    Nothing is compared, as `device_put` does, to which a NaN is never equal.
    """
    with jax.enable_x64(True):
        return jax.make_array_from_callback(
            numbers.shape, layout, lambda index: np.asarray(numbers[index])
        )


def put_together(tree: PyTree, *others: PyTree) -> PyTree:
    """The tree, with the arrays that nobody has put anywhere where the rest is.

    So a compiled loop takes what it has returned without being compiled anew. The rest
    is the first array of `tree` or `others` that was put somewhere, or a layout there;
    where that is on several devices, each gets a copy.
    """
    wheres = (_where(leaf) for leaf in jax.tree.leaves((tree, *others)))
    where = next((x for x in wheres if x is not None), None)
    if where is None:
        return tree
    if isinstance(where, NamedSharding):
        where = layout_on(where.mesh)
    return jax.tree.map(lambda x: _put(x, where) if _is_loose(x) else x, tree)


def _put(array: Any, where: Any) -> Any:
    """An array that each process holds, on the devices of all.

    JAX compares what the processes have, and refuses what differs. Keys it doesn't put
    on other processes' devices; their data it does.
    """
    typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    if where.is_fully_addressable or not typed:
        return jax.device_put(array, where)
    data = jax.device_put(jax.random.key_data(array), where)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))


def _is_loose(leaf: Any) -> bool:
    """Whether it's an array that JAX moves at will."""
    return isinstance(leaf, jax.Array | np.ndarray) and _where(leaf) is None


def _where(leaf: Any) -> Any:
    """Where an array was put, or a layout says; `None`: JAX moves it at will."""
    if isinstance(leaf, NamedSharding):
        return leaf
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def mesh_of(tree: PyTree) -> contextlib.AbstractContextManager[Any]:
    """While tracing: the mesh with explicit axes on which a tree's arrays are, if any.

    An array that is made inside must be on it too, to be joined with them.
    """
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array):
            continue
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty:
            return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()


def spans_processes(tree: PyTree) -> bool:
    """Whether a part of a tree's arrays is on other processes' devices."""
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(tree)
    )


def check_devices(named: Iterable[tuple[str, Any]]) -> None:
    """Refuses arrays that are held on different devices, with their names.

    JAX moves NumPy arrays, and those that no one has put anywhere, to where the others
    are; they fit everywhere.

    Raises:
      ValueError: two arrays are on different devices.
    """
    first: tuple[str, Any] | None = None
    for name, array in named:
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            continue
        if not array.committed:
            continue
        first = first or (name, array)
        if array.sharding.device_set != first[1].sharding.device_set:
            mine, other = (
                f"`{n}` is on {_devices(x)}" for n, x in (first, (name, array))
            )
            fewer = min((first, (name, array)), key=lambda n: n[1].sharding.num_devices)
            raise ValueError(
                f"{mine}, and {other}. Put them on one mesh: `jax.device_put(array, "
                f"jax.NamedSharding(mesh, jax.P()))`, with the array `{fewer[0]}`, has "
                "a copy on each of its devices."
            )


def _devices(array: Any) -> str:
    devices = sorted(array.sharding.device_set, key=lambda device: device.id)
    ids = ", ".join(str(device.id) for device in devices[:8])
    dots = ", ..." if len(devices) > 8 else ""
    count = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
    return f"{count} ({devices[0].platform} {ids}{dots})"


def numbers_of(array: Any) -> np.ndarray:
    """The numbers of an array that is small enough to have them here.

    Of one whose parts are on several processes' devices, each must ask.
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        layout = layout_of(array)
        assert layout is not None  # or all of it would be here
        with jax.enable_x64(True):
            array = jax.device_put(array, layout_on(layout.mesh))
    return np.asarray(array)
