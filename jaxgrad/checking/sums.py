"""Sums over one leaf, and products of two: on the host, or where they are spread."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxgrad.checking.leaves import Leaf, made_of_leaf, norm, read_of_leaf


@read_of_leaf
def is_finite(xp: Any, array: Leaf) -> Any:
    """Whether all entries are."""
    return xp.isfinite(array).all()


@read_of_leaf
def any_nonzero(xp: Any, array: Leaf) -> Any:
    """Whether an entry isn't zero."""
    return array.any()


@read_of_leaf
def size_of(xp: Any, array: Leaf) -> Any:
    """The 2-norm of a leaf."""
    return norm(xp, array)


@read_of_leaf
def gap_of(xp: Any, array: Leaf, other: Leaf) -> Any:
    """The 2-norm of the difference of two leaves."""
    return norm(xp, array - other)


@read_of_leaf
def change_along(xp: Any, array: Leaf, other: Leaf, direction: Leaf) -> Any:
    """The 2-norm of the parts that a direction has in the difference of two leaves."""
    return norm(xp, (array - other) * direction)


@read_of_leaf
def product(xp: Any, array: Leaf, direction: Leaf) -> Any:
    """The inner product with a direction, and the 2-norm of its parts."""
    with np.errstate(invalid="ignore"):  # a gradient that isn't finite
        parts = array * direction
        return parts.sum(), norm(xp, parts)


@read_of_leaf
def moving(xp: Any, direction: Leaf) -> Any:
    """The 2-norm of a direction, and how many entries go."""
    return norm(xp, direction), xp.count_nonzero(direction)


@read_of_leaf
def root_mean_square(xp: Any, array: Leaf) -> Any:
    """The typical size of an entry."""
    return xp.sqrt(xp.mean(xp.square(array)))


@made_of_leaf
def wide(xp: Any, array: Leaf) -> Any:
    """The leaf in float64."""
    return array.astype(xp.float64, copy=False)


@made_of_leaf
def scaled(xp: Any, array: Leaf, scale: Leaf) -> Any:
    """The leaf times another one, entry by entry."""
    return array * scale
