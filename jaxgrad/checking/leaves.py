"""One leaf's numbers: NumPy on the host, and programs where it's spread over devices.

A leaf that is spread, and larger than what a report shows of it, stays where it is:
each function below then runs as one program on all of its devices, and what comes to
the host is a few numbers, the same ones in every process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.placing import (
    automatic,
    handed_out,
    layout_of,
    layout_on,
    numbers_of,
    seen_as,
)

Leaf = np.ndarray | jax.Array
"""A leaf's numbers on the host, or spread over devices."""

SMALL_LEAF = 64
"""Of a leaf up to this size each entry may be looked at, so that it's on the host."""


def is_spread(array: Any) -> bool:
    """Whether an array is on several devices."""
    return layout_of(array) is not None


def on_mesh(array: Any) -> bool:
    """Whether a leaf stays on its devices."""
    return is_spread(array) and array.size > SMALL_LEAF


def stays_spread(array: Any) -> bool:
    """Whether a leaf isn't whole on any device, so that no place sees all of it."""
    return on_mesh(array) and not array.is_fully_replicated


def on_host(arrays: Any) -> Any:
    """The arrays on the CPU; where they are, if one of them is spread."""
    in_mesh = jax.sharding.get_abstract_mesh().size > 1
    if in_mesh or any(map(is_spread, jax.tree.leaves(arrays))):
        return arrays
    return jax.device_put(arrays, jax.local_devices(backend="cpu")[0])


def as_numpy(array: Any) -> np.ndarray:
    """A small array, or one of one device, on the host, in float64."""
    return numbers_of(array).astype(np.float64, copy=False)


def leaf_of(array: Any, like: Any) -> Leaf:
    """The array where the leaf `like` is worked on, and as that is spread."""
    if not on_mesh(like):
        return numbers_of(array)
    sharding = automatic(like.sharding)
    if not is_spread(array):
        return handed_out(numbers_of(array), sharding)  # type: ignore[no-any-return]
    if not automatic(array.sharding).is_equivalent_to(sharding, array.ndim):
        with jax.enable_x64(True):
            array = jax.device_put(seen_as(array, automatic(array.sharding)), sharding)
    return seen_as(array, sharding)  # type: ignore[no-any-return]


def operand(numbers: Leaf, like: Any) -> Any:
    """A leaf's numbers for a program that takes them as the array `like` is."""
    if not is_spread(like):
        return numbers
    if isinstance(numbers, jax.Array):
        return seen_as(numbers, like.sharding)
    return handed_out(numbers, like.sharding)


def shared(arrays: Any, beside: Sequence[Any]) -> Any:
    """The arrays, whole on each device, if those that go beside them are spread."""
    meshes = [x.sharding.mesh for x in beside if is_spread(x)]
    if not meshes:
        return arrays
    return jax.device_put(arrays, layout_on(meshes[0]))


def zeros_like(array: Any) -> Any:
    """Zeros of an array's shape in float64, spread as it is."""
    if not is_spread(array):
        return jnp.zeros(array.shape, jnp.float64)
    return seen_as(_zeros(array.shape, automatic(array.sharding)), array.sharding)


def unmoved(leaf: Any) -> Leaf:
    """A direction in a leaf that goes nowhere."""
    if on_mesh(leaf):
        return _zeros(leaf.shape, automatic(leaf.sharding))  # type: ignore[no-any-return]
    return np.broadcast_to(np.zeros(()), leaf.shape)


def stacked(parts: dict[int, Leaf], rows: int, like: Any) -> Any:
    """For a program: several leaves at once, zeros but for some rows."""
    shape = (rows, *like.shape)
    if not on_mesh(like):
        several = np.zeros(shape)
        for row, numbers in parts.items():
            several[row] = numbers
        return (
            handed_out(several, _in_rows(like.sharding)) if is_spread(like) else several
        )
    spread = _zeros(shape, _in_rows(automatic(like.sharding)))
    for row, numbers in parts.items():
        spread = _with_row(spread, numbers, row)
    return seen_as(spread, _in_rows(like.sharding))


def _in_rows(sharding: Any) -> Any:
    return layout_on(sharding.mesh, None, *sharding.spec)


def _zeros(shape: tuple[int, ...], sharding: Any) -> Any:
    with _computing(sharding):
        return _zeros_on(shape, sharding)()


@functools.cache
def _zeros_on(shape: tuple[int, ...], sharding: Any) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, jnp.float64), out_shardings=sharding)


Function = TypeVar("Function", bound=Callable[..., Any])


def _either(function: Callable[..., Any], made: bool) -> Callable[..., Any]:
    @functools.cache
    def program(sharding: Any, options: tuple[tuple[str, Any], ...]) -> Any:
        bound = functools.partial(function, jnp, **dict(options))
        whole = layout_on(sharding.mesh)
        return jax.jit(bound, out_shardings=sharding if made else whole)

    @functools.wraps(function)
    def run(*operands: Any, **options: Any) -> Any:
        spread = [x for x in operands if isinstance(x, jax.Array)]
        if not spread:
            out = function(np, *operands, **options)
            return np.asarray(out) if made else out
        sharding = spread[0].sharding
        with _computing(sharding):
            out = program(sharding, tuple(options.items()))(*operands)
        return out if made else jax.tree.map(np.asarray, out)

    return run


@contextlib.contextmanager
def _computing(sharding: Any) -> Iterator[None]:
    """In float64 on a mesh, whatever the user's settings and mesh."""
    with (
        jax.enable_x64(True),
        jax.disable_jit(False),
        jax.threefry_partitionable(True),  # each device draws its own numbers
        jax.set_mesh(sharding.mesh),
    ):
        yield


def read_of_leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of NumPy arrays, or `xp` of JAX's, to a few numbers on the host."""
    return _either(function, made=False)


def made_of_leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of NumPy arrays, or `xp` of JAX's, to one as its first operand is."""
    return _either(function, made=True)


def norm(xp: Any, array: Any) -> Any:
    """The 2-norm of all entries."""
    if xp is np:
        return np.linalg.norm(array)
    return jnp.sqrt(jnp.sum(jnp.square(array)))


def linear(shape: tuple[int, ...]) -> Any:
    """In a program: the place of each entry in the flattened array."""
    place, stride = jnp.zeros(shape, jnp.int64), 1
    for axis in reversed(range(len(shape))):
        place += stride * jax.lax.broadcasted_iota(jnp.int64, shape, axis)
        stride *= shape[axis]
    return place


@made_of_leaf
def _with_row(xp: Any, rows: Leaf, numbers: Leaf, row: Any) -> Any:
    here = jax.lax.broadcasted_iota(xp.int32, rows.shape, 0) == row
    return xp.where(here, numbers, rows)


def values_at(array: Leaf, places: np.ndarray) -> np.ndarray:
    """The entries at some places of the flattened leaf."""
    return np.asarray(_picked(array, padded(places))[: len(places)])


# Programs are made for this many places, or as many times twice that.
_PLACES = 16


def padded(places: np.ndarray) -> np.ndarray:
    """Places, filled up with some that aren't."""
    width = _PLACES
    while width < len(places):
        width *= 2
    return np.concatenate([places, np.full(width - len(places), -1)])


def pick(xp: Any, array: Any, places: Any) -> Any:
    """The entries at some places of the flattened array."""
    if xp is np:
        return array.ravel()[places]
    # A sum of what each device has of it: nothing is flattened, or gathered.
    at = linear(array.shape)
    return jax.lax.map(lambda place: xp.sum(xp.where(at == place, array, 0)), places)


@read_of_leaf
def _picked(xp: Any, array: Leaf, places: Any) -> Any:
    return pick(xp, array, places)


def with_values(array: Leaf, places: np.ndarray, values: np.ndarray) -> Leaf:
    """The leaf with other values at some places of the flattened one."""
    if isinstance(array, np.ndarray):
        array = array.copy()
        array.ravel()[places] = values
        return array
    some = padded(places)
    values = np.concatenate([values, np.zeros(len(some) - len(places))])
    return _replaced(array, some, values)  # type: ignore[no-any-return]


@made_of_leaf
def _replaced(xp: Any, array: Leaf, places: Any, values: Any) -> Any:
    at = linear(array.shape)

    def replace(array: Any, pair: Any) -> Any:
        return xp.where(at == pair[0], pair[1], array), None

    return jax.lax.scan(replace, array, (places, values))[0]


@made_of_leaf
def filled(xp: Any, array: Leaf, value: Any) -> Any:
    """One number in all entries."""
    return xp.full(array.shape, value)


def single(like: Leaf, place: int, value: float) -> Leaf:
    """Zeros, but for one place of the flattened leaf."""
    if isinstance(like, np.ndarray):
        one = np.zeros(like.size)
        one[place] = value
        return one.reshape(like.shape)
    return _single(like, place, value)  # type: ignore[no-any-return]


@made_of_leaf
def _single(xp: Any, like: Leaf, place: Any, value: Any) -> Any:
    return xp.where(linear(like.shape) == place, value, 0.0)


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers of both signs, of sizes from 0.5 to 1.5.

    Not near 0, so that no entry hides; not all of one size, so that no two cancel.
    """
    numbers = np.asarray(rng.uniform(0.5, 1.5, shape))
    numbers *= rng.integers(0, 2, shape, np.int8) * 2 - 1
    return numbers


def spread_like(rng: np.random.Generator, leaf: Any) -> Leaf:
    """Such numbers for a leaf, made where it is worked on."""
    if not on_mesh(leaf):
        return spread(rng, leaf.shape)
    words = rng.integers(0, 2**32, 2, np.uint32)
    return _spread(seen_as(leaf, automatic(leaf.sharding)), words)  # type: ignore[no-any-return]


@made_of_leaf
def _spread(xp: Any, leaf: Leaf, words: Any) -> Any:
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    bits = jax.random.bits(key, leaf.shape, jnp.uint32)
    sizes = 0.5 + (bits >> 1).astype(jnp.float64) / 2**31
    return xp.where(bits & 1, sizes, -sizes)
