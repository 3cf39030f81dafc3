"""Looks at an array where it is: in NumPy at hand, else spread over its devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad.placing import (
    automatic,
    handed_out,
    layout_of,
    numbers_of,
    seen_as,
)

Index = tuple[int, ...]


def at_hand(array: Any) -> Any:
    """An array in NumPy, if one device has all of it; else one of JAX's, as it lies.

    NumPy compiles nothing. What is spread is never gathered: of it JAX's functions make
    masks, which are spread too, and counts.
    """
    layout = layout_of(array)
    if layout is None or array.is_fully_replicated:
        return np.asarray(array)
    return seen_as(array, automatic(layout))


def space(array: Any) -> Any:
    """The module of an array's functions: NumPy, or its twin in JAX."""
    return jnp if isinstance(array, jax.Array) else np


def placed(numbers: Any, like: Any) -> Any:
    """Numbers as an array with the dtype of another, on its devices."""
    layout = layout_of(like)
    if layout is None:
        return jnp.asarray(numbers, like.dtype)
    if isinstance(numbers, jax.Array):
        move = jax.jit(lambda x: x.astype(like.dtype), out_shardings=layout)
        return move(numbers)
    return handed_out(np.asarray(numbers, like.dtype), layout)


def pick(array: Any, index: Index) -> Any:
    """The number at an index; with a shorter index, those along the first axis."""
    array = at_hand(array)
    whole = (slice(None),) * (array.ndim - len(index))
    if space(array) is np:
        return array[(*whole, *index)]
    return numbers_of(_picked(array, jnp.asarray(index, int)))


def picked(array: Any, index: Any) -> Any:
    """The same, while tracing, by a mask: an array that is spread stays so."""
    first = array.ndim - len(index)
    here = _places(array.shape, index, first)[1]
    axes = tuple(range(first, array.ndim))
    if array.dtype == bool:
        return jnp.any(array & here, axis=axes)
    # Not the maximum: that of several devices may lose a NaN.
    return jnp.sum(jnp.where(here, array, 0), axis=axes)


_picked = jax.jit(picked)


def _places(shape: Index, index: Any, first: int = 0) -> tuple[Any, Any]:
    """Which entries come before an index, and which are at it, from an axis on."""
    before: Any = False
    here: Any = jnp.ones(shape, bool)
    for axis in range(first, len(shape)):
        places = lax.broadcasted_iota(np.int32, shape, axis)
        before |= here & (places < index[axis - first])
        here &= places == index[axis - first]
    return before, here


def only(mask: Any, index: Index) -> Any:
    """A mask, at one place."""
    if space(mask) is jnp:
        return mask & _places(mask.shape, index)[1]
    kept = np.zeros_like(mask)
    kept[index] = mask[index]
    return kept


def nth(mask: Any, rank: int = 0) -> Index:
    """The place of a mask's first true entry, or of the one after `rank` others."""
    if space(mask) is np:
        flat = np.flatnonzero(mask)[rank]
        return tuple(int(i) for i in np.unravel_index(flat, np.shape(mask)))
    return tuple(int(i) for i in numbers_of(_nth(mask, rank)))


@jax.jit
def _nth(mask: Any, rank: Any) -> Any:
    index = []
    for axis in range(mask.ndim):
        rest = tuple(range(axis + 1, mask.ndim))
        counts = jnp.sum(mask, axis=rest, keepdims=True)
        # The slices before this one are masked out by now.
        along = jnp.cumsum(jnp.sum(counts, axis=tuple(range(axis))).reshape(-1))
        place = jnp.sum(along <= rank)
        rank -= jnp.where(place > 0, along[place - 1], 0)
        mask &= lax.broadcasted_iota(np.int32, mask.shape, axis) == place
        index.append(place)
    return jnp.stack(index)


def between(mask: Any, start: int, stop: int) -> Any:
    """The true entries of a mask from one of them to another, in order."""
    count = int(mask.sum())
    start, stop = max(start, 0), min(stop, count)
    if start >= stop:
        return mask & False
    if (start, stop) == (0, count):
        return mask
    if space(mask) is np:
        kept = np.zeros(mask.size, bool)
        kept[np.flatnonzero(mask)[start:stop]] = True
        return kept.reshape(mask.shape)
    ends = [nth(mask, rank) if rank < count else mask.shape for rank in (start, stop)]
    return _between(mask, *ends)


@jax.jit
def _between(mask: Any, start: Any, stop: Any) -> Any:
    return mask & ~_places(mask.shape, start)[0] & _places(mask.shape, stop)[0]
