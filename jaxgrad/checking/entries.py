"""Which entries of a leaf differ from what is right, and by more than they may."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.leaves import (
    Leaf,
    linear,
    norm,
    padded,
    pick,
    read_of_leaf,
)
from jaxgrad.checking.measuring import ROUNDING


class Suspects(NamedTuple):
    """Entries of a leaf to be measured one by one.

    Attributes:
      places: where they are in the flattened leaf, the worst first.
      right: what the gradient should be, as far as it's known; NaN elsewhere.
      total: how many entries are thought to be wrong, these and others; `None` if
        they are too many to be told, and unknown where all entries are measured.
      rest: the 2-norm of the other entries' errors.
    """

    places: np.ndarray
    right: Leaf
    total: int | None
    rest: float = 0.0


class Beyond(NamedTuple):
    """The entries that are off by more than they may be.

    Attributes:
      places: the worst of them, in the flattened leaf, the worst first.
      total: how many there are.
      rest: the 2-norm of the others' errors, on a mesh.
    """

    places: np.ndarray
    total: int
    rest: float


def beyond(
    claimed: Leaf, right: Leaf, noise: Leaf | float, value: Leaf, rtol: float, most: int
) -> Beyond:
    """Compares a claimed gradient with the right one, entry by entry."""
    places, total, rest = _beyond(claimed, right, noise, value, rtol, most=most)
    return Beyond(places[: int(total)], int(total), float(rest))


@read_of_leaf
def _beyond(
    xp: Any, claimed: Leaf, right: Leaf, noise: Any, value: Leaf, rtol: Any, most: int
) -> Any:
    error = xp.abs(claimed - right)
    over = error - _allowance(xp, claimed, right, noise, value, rtol)
    count = xp.count_nonzero(over > 0)
    off = norm(xp, error) - rtol * norm(xp, right)
    # Many entries are a little off, each by less than it may be.
    spread = (count == 0) & (off > norm(xp, xp.broadcast_to(noise, error.shape)))
    own = error > rtol * xp.abs(right)
    if xp is np:  # the rest is not asked for
        count = np.count_nonzero(own) if spread else count
        return _worst(np, error if spread else over, most), count, 0.0
    count = xp.where(spread, xp.count_nonzero(own), count)
    rest = norm(xp, xp.where(xp.where(spread, own, over > 0), 0.0, error))
    return _worst(xp, xp.where(spread, error, over), most), count, rest


def _worst(xp: Any, scores: Any, most: int) -> Any:
    """The places of the largest numbers, the largest first."""
    if xp is np:
        return np.argsort(-scores, axis=None)[:most]
    at = linear(scores.shape)

    def take(scores: Any, _: Any) -> Any:
        place = xp.where(scores == scores.max(), at, scores.size).min()
        return xp.where(at == place, -xp.inf, scores), place

    return jax.lax.scan(take, scores, length=most)[1]


def allowed_at(
    claimed: Leaf,
    right: Leaf,
    noise: Leaf | float,
    value: Leaf,
    rtol: float,
    places: np.ndarray,
) -> np.ndarray:
    """What entries may be off by, at some places of the flattened leaf."""
    found = _allowed_at(claimed, right, noise, value, rtol, padded(places))
    return np.asarray(found[: len(places)])


@read_of_leaf
def _allowed_at(
    xp: Any, claimed: Leaf, right: Leaf, noise: Any, value: Leaf, rtol: Any, places: Any
) -> Any:
    bound = _allowance(xp, claimed, right, noise, value, rtol)
    return pick(xp, xp.asarray(bound), places)


def _allowance(
    xp: Any, claimed: Leaf, right: Leaf, noise: Any, value: Leaf, rtol: Any
) -> Any:
    """What an entry may be off by: `rtol` of itself, and its share of noise.

    Noise is spread over the leaf, in proportion to what the entries' gradients are or
    to what those times the entries are. The quarter of the entries with the least error
    shows its size: in a normal distribution 30 times their bound is beyond the largest
    of a million. One wrong entry stands out of it. It is no noise if it's more than
    `rtol`.
    """
    known = xp.isfinite(right)
    whole = xp is np and known.all()
    sizes = xp.abs(value)
    typical = xp.sqrt(xp.mean(xp.square(sizes)))
    sizes = xp.where(sizes == 0, xp.where(typical > 0, typical, 1.0), sizes)

    def share(weight: Any) -> Any:
        error, exact = claimed - right, right
        if weight is not None:
            error, exact = error * weight, exact * weight
        count = xp.maximum(xp.count_nonzero(known), 1)
        rms = norm(xp, exact if whole else xp.where(known, exact, 0.0)) / count**0.5
        least = _quartile(xp, xp.abs(error), known)
        return xp.minimum(30 * least, rtol * rms) + 10 * ROUNDING * rms

    bound = xp.minimum(share(sizes) / sizes, share(None))
    return bound + rtol * xp.abs(right) + noise


def _quartile(xp: Any, error: Any, known: Any) -> Any:
    """The error that a quarter of the known entries doesn't exceed; 0 of but one."""
    if xp is np:
        error = error[known]
        quarter = (error.size - 1) // 4
        return np.partition(error, quarter)[quarter] if error.size > 1 else 0.0
    # Between two numbers' bits, which are in the numbers' order: nothing is sorted.
    count = xp.count_nonzero(known)
    rank = (count - 1) // 4 + 1

    def halve(_: Any, ends: Any) -> Any:
        low, high = ends
        middle = low + (high - low) // 2
        below = error <= jax.lax.bitcast_convert_type(middle, jnp.float64)
        enough = xp.count_nonzero(known & below) >= rank
        return xp.where(enough, low, middle + 1), xp.where(enough, middle, high)

    most = np.float64(np.inf).view(np.int64)
    _, bits = jax.lax.fori_loop(0, 64, halve, (jnp.int64(0), jnp.int64(most)))
    return xp.where(count > 1, jax.lax.bitcast_convert_type(bits, jnp.float64), 0.0)


@read_of_leaf
def known_sizes(xp: Any, claimed: Leaf, right: Leaf) -> Any:
    """The 2-norms of the right gradient and of the error, as far as they're known."""
    known = xp.isfinite(right)
    size = norm(xp, xp.where(known, right, 0.0))
    return size, norm(xp, xp.where(known, claimed - right, 0.0))


@read_of_leaf
def nonfinite(xp: Any, array: Leaf, *, most: int) -> Any:
    """How many entries aren't finite, and where the first ones are."""
    bad = ~xp.isfinite(array)
    if xp is np:
        return np.count_nonzero(bad), np.flatnonzero(bad)[:most]
    return xp.count_nonzero(bad), _worst(xp, bad.astype(xp.float64), most)


class Fits(NamedTuple):
    """How near a claimed gradient is to what a simple mistake would make it.

    Attributes:
      claimed, right, off: the 2-norms of both gradients and of their difference.
      factor, unlike: what brings the right one closest, and the 2-norm of the rest.
      shift, uneven: what is added to each entry, and the 2-norm of the rest.
      nonzero: how many entries aren't zero in both.
    """

    claimed: Any
    right: Any
    off: Any
    factor: Any
    unlike: Any
    shift: Any
    uneven: Any
    nonzero: Any


@read_of_leaf
def fits(xp: Any, claimed: Leaf, right: Leaf) -> Any:
    """Tries the mistakes that sums over the leaf can tell."""
    size, off = norm(xp, right), claimed - right
    factor = xp.sum(claimed * right) / xp.where(size > 0, size**2, 1.0)
    shift = xp.mean(off)
    return Fits(
        norm(xp, claimed),
        size,
        norm(xp, off),
        factor,
        norm(xp, claimed - factor * right),
        shift,
        norm(xp, off - shift),
        xp.count_nonzero((claimed != 0) | (right != 0)),
    )
