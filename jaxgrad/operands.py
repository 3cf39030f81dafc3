"""`(params, *args)` as a list of arrays with names, and the way back."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.pytrees import (
    PyTree,
    is_array,
    kind_of,
    leaf_name,
    merge_static,
    nothing_to_differentiate,
    operand_name,
    split_static,
)


@dataclass(frozen=True)
class Operands:
    """`(params, *args)` as arrays, and the way back."""

    arrays: list[Any]
    static: Any
    names: tuple[str, ...]
    """The arrays' names: `layers[0].weight`, or `args[0].image`."""
    chosen: tuple[int, ...]
    """The places of the leaves to differentiate among the arrays."""

    @property
    def values(self) -> list[Any]:
        """The leaves to differentiate."""
        return [self.arrays[place] for place in self.chosen]

    @property
    def fixed(self) -> list[Any]:
        """The other arrays."""
        places = set(self.chosen)
        return [x for place, x in enumerate(self.arrays) if place not in places]

    def merge(self, values: Sequence[Any], fixed: Sequence[Any]) -> tuple[Any, ...]:
        """`(params, *args)` again, with other values."""
        stock, places = iter(fixed), dict(zip(self.chosen, values, strict=True))
        arrays = [
            places[place] if place in places else next(stock)
            for place in range(len(self.arrays))
        ]
        return merge_static(arrays, self.static)


def operands_of(
    params: PyTree, args: tuple[Any, ...], patterns: Sequence[str] | None
) -> tuple[Operands, tuple[str, ...], list[tuple[str, Any]]]:
    """The arrays of `(params, *args)`, the names of the leaves to check, and the rest.

    The rest are the leaves of integers, which have no gradient.

    Raises:
      TypeError: a leaf is complex or of another library, or none is floating.
      ValueError: a pattern fits no leaf.
    """
    arrays, static = split_static((params, *args))
    # As JAX takes them: a NumPy array of float64 is one of float32, unless it has x64.
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in arrays]
    named = jax.tree_util.tree_leaves_with_path(params)
    place, chosen, names, integers = 0, [], [], []
    for path, leaf in named:
        name, kind = leaf_name(path), kind_of(leaf)
        if kind == "complex":
            raise TypeError(
                f"Leaf `{name}` has dtype {leaf.dtype}: complex parameters aren't "
                "covered. Hold the real and the imaginary part as two real leaves, and "
                "join them inside the loss."
            )
        if kind == "differentiable":
            chosen.append(place)
            names.append(name)
        elif kind == "integer":
            integers.append((name, leaf))
        place += is_array(leaf)
    if not names:
        kinds = [kind_of(leaf) for _, leaf in named]
        raise TypeError(nothing_to_differentiate(named, kinds))
    if patterns is not None:
        keep: set[str] = set()
        for pattern in patterns:
            fits = {n for n in names if n == pattern or _fits(n, pattern)}
            if not fits:
                raise ValueError(
                    f"leaves={pattern!r} fits no leaf. The leaves are "
                    f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; a "
                    "pattern is a path, `*` standing for any text."
                )
            keep |= fits
        both = [(c, n) for c, n in zip(chosen, names, strict=True) if n in keep]
        chosen, names = [c for c, _ in both], [n for _, n in both]
        integers = []
    named = jax.tree_util.tree_leaves_with_path((params, *args))
    every = tuple(operand_name(path) for path, leaf in named if is_array(leaf))
    return Operands(arrays, static, every, tuple(chosen)), tuple(names), integers


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
