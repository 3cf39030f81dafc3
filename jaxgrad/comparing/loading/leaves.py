"""The leaves of a pytree that wait for numbers, whatever library made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.pytrees import Kind, PyTree, as_params, foreign, kind_of, leaf_name


@dataclass(frozen=True, eq=False)
class Leaf:
    """A leaf to fill, or one that stays.

    Attributes:
      path: its path.
      kind: what it is, a `jax.ShapeDtypeStruct` as the array that it stands for.
      shape: its shape; empty if it's no array.
      dtype: its dtype, or `None`.
      owner: the object that holds it as an attribute, or `None`.
      value: itself.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: Any
    owner: Any
    value: Any


def leaves_of(like: PyTree) -> tuple[list[Leaf], Any]:
    """The leaves and the tree's structure.

    Raises:
      TypeError: a leaf is complex or of another library.
      ValueError: no leaf is an array of floats.
    """
    like = as_params(like)
    named, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, value in named:
        name = leaf_name(path)
        kind = _kind(value)
        if kind == "complex":
            raise TypeError(
                f"Leaf `{name}` has dtype {value.dtype}: complex parameters aren't "
                "covered. Hold the real and the imaginary part as two real leaves."
            )
        if kind == "foreign":
            raise TypeError(f"Leaf `{name}` is {foreign(value)}.")
        shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", None)
        if kind == "static":
            shape, dtype = (), None
        leaves.append(Leaf(name, kind, tuple(shape), dtype, _owner(like, path), value))
    if not any(leaf.kind == "differentiable" for leaf in leaves):
        raise ValueError(
            "like has no array of floats, so there is nothing to load. It is the "
            "pytree to fill: your model, or jax.eval_shape of what makes it."
        )
    return leaves, treedef


def _kind(value: Any) -> Kind:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return kind_of(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return "fixed"
    return kind_of(np.zeros((), value.dtype))


def _owner(tree: Any, path: tuple[Any, ...]) -> Any:
    """The object whose attribute the leaf is; `None` in dicts and lists."""
    if not path or not isinstance(path[-1], jax.tree_util.GetAttrKey):
        return None
    for key in path[:-1]:
        try:
            if isinstance(key, jax.tree_util.GetAttrKey):
                tree = getattr(tree, key.name)
            elif isinstance(key, jax.tree_util.DictKey):
                tree = tree[key.key]
            elif isinstance(key, jax.tree_util.SequenceKey):
                tree = tree[key.idx]
            else:
                return None
        except (AttributeError, LookupError, TypeError):
            return None
    return tree
