"""Where arrays are: the layouts of leaves over many devices, and how they're kept."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgrad.pytrees import PyTree, kind_of

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


def spread_layouts(params: PyTree) -> tuple[Layout, ...]:
    """The layouts of the leaves to differentiate; empty if all are on one device."""
    layouts = tuple(
        layout_of(leaf)
        for leaf in jax.tree.leaves(params)
        if kind_of(leaf) == "differentiable"
    )
    return layouts if any(layouts) else ()


def keep(tree: PyTree, layouts: tuple[Layout, ...]) -> PyTree:
    """Inside a compiled function: the tree, with its leaves in these layouts."""
    leaves, treedef = jax.tree.flatten(tree)
    kept = [laid(leaf, layout) for leaf, layout in zip(leaves, layouts, strict=True)]
    return jax.tree.unflatten(treedef, kept)


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


def on_one_mesh(tree: PyTree, *others: PyTree) -> PyTree:
    """The tree, with every array that is on one device copied to the mesh of the rest.

    So a compiled loop takes what it has returned without being compiled anew. The mesh
    is that of the first leaf of `tree` or `others` that has one.
    """
    layouts = (x for part in (tree, *others) for x in layouts_of(part))
    layout = next((x for x in layouts if x is not None), None)
    if layout is None:
        return tree
    everywhere = layout_on(layout.mesh)
    return jax.tree.map(
        lambda x: x if layout_of(x) else jax.device_put(x, everywhere), tree
    )


def mesh_of(tree: PyTree) -> contextlib.AbstractContextManager[Any]:
    """While tracing: the mesh with explicit axes on which a tree's arrays are, if any.

    An array that is made inside must be on it too, to be joined with them.
    """
    for leaf in jax.tree.leaves(tree):
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
