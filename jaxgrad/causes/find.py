"""Says in what way a gradient differs from the right one: the likely mistake.

Each cause is a hypothesis, which predicts the claimed gradient from the right one.
They are tested, the simplest first, by what they leave unexplained.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgrad.causes.guesses import (
    Cause,
    Guess,
    bulk,
    constant,
    first,
    multiples,
    times,
    zero,
)

Array = npt.NDArray[np.float64]
Others = tuple[Mapping[str, Array], Mapping[str, Array]]  # claimed, and right
Parts = Sequence[tuple[str, Array]]


@np.errstate(all="ignore")  # other leaves may be infinite, or out of proportion
def find_cause(
    name: str,
    claimed: Array,
    reference: Array,
    *,
    counts: Mapping[str, int] | None = None,
    other_claimed: Mapping[str, Array] | None = None,
    other_reference: Mapping[str, Array] | None = None,
    contributions: Parts | Callable[[], Parts] = (),
    noise: float = 1e-9,
) -> Cause:
    """Finds the simplest cause that turns `reference` into `claimed`.

    A cause fits if it leaves no more than `noise` unexplained. Where none does, one
    that explains 99 % of the difference is taken, and its text says what is left.

    Args:
      name: the leaf's name, for the text.
      claimed: the gradient in question; all of its entries are finite.
      reference: the right one; NaN in the entries that weren't measured.
      counts: sizes that a factor may come from: `{"batch size": 8}`.
      other_claimed: the claimed gradients of other leaves, by name.
      other_reference: the right gradients of other leaves, by name.
      contributions: labelled arrays that sum to the reference (the gradients of a
        loss's terms, or of a batch's rows), or a function that returns them, which
        is called if nothing simpler fits.
      noise: the uncertainty of the numbers, as a share of their 2-norm.

    Raises:
      ValueError: the two agree to within `noise`, or can't be compared.
    """
    who = f"The gradient of `{name}`"
    pair = _Pair(who, claimed, reference, noise)
    others = other_claimed or {}, other_reference or {}
    return (
        first(who, pair, _simple(pair, others, multiples(counts or {})))
        or first(who, pair, _missing(pair, contributions))
        or Cause("unknown", f"{who} {_unknown(pair)}.")
    )


class _Pair:
    """The claimed gradient and the right one: whole, and what is known of them."""

    def __init__(self, who: str, claimed: Array, reference: Array, noise: float):
        if np.shape(claimed) != np.shape(reference):
            shapes = f"{np.shape(claimed)}, its reference {np.shape(reference)}"
            raise ValueError(f"{who} has shape {shapes}.")
        if not np.isfinite(claimed).all():
            raise ValueError(f"{who} isn't finite, which is a cause of its own.")
        finite = np.isfinite(reference).ravel()
        if not finite.any():
            raise ValueError(f"{who} has a reference without a single finite entry.")
        self.all_known = bool(finite.all())
        self.known: Any = slice(None) if self.all_known else np.flatnonzero(finite)
        largest = max(np.abs(claimed).max(), np.nanmax(np.abs(reference)))
        self.unit = float(2.0 ** (np.frexp(largest)[1] - 1))  # squares won't overflow
        self.claimed: Array = np.asarray(np.divide(claimed, self.unit))
        self.reference: Array = np.asarray(np.divide(reference, self.unit))
        self.ours = self.claimed.ravel()[self.known]
        self.right = self.reference.ravel()[self.known]
        self.our_norm, self.right_norm = _norm(self.ours), _norm(self.right)
        self.off = self.ours - self.right
        self.off_norm = _norm(self.off)
        self.noise = noise
        if self.off_norm <= noise * self.right_norm:
            raise ValueError(f"{who} agrees with its reference: nothing is wrong.")

    def near(self, size: float) -> float:
        """How much may be left if a hypothesis is to explain the bulk.

        A share of the difference, whatever its cause, and of the numbers too: a tiny
        gradient is a hundredth of the right one without being a multiple of it.
        """
        return bulk(self.right.size) * min(self.off_norm, size)

    def part(self, array: Array) -> Array:
        """The entries of an array where the reference is known."""
        known: Array = np.asarray(array, float).ravel()[self.known]
        return known / self.unit

    def whole(self, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Undoes `part`, with zeros where the reference isn't known."""
        if self.all_known:
            return part.reshape(self.claimed.shape)
        flat = np.zeros(self.claimed.size, part.dtype)
        flat[self.known] = part
        return flat.reshape(self.claimed.shape)


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.ravel()))


def _fit(target: Array, source: Array) -> tuple[float, float]:
    """The factor that brings `source` closest to `target`, and what is left."""
    factor = float(np.vdot(source, target) / (np.vdot(source, source) or 1.0))
    left = np.multiply(source, -factor)
    left += target
    return factor, _norm(left)


def _simple(p: _Pair, others: Others, multiples: Mapping[int, str]) -> Iterator[Guess]:
    """The hypotheses that need no contributions, the simplest first."""
    # One number among many says nothing of the others.
    enough = p.right.size > 1 or p.claimed.size == 1
    none = _norm(p.claimed) <= p.noise * p.right_norm
    if enough or none:
        yield zero(p, none)
    one_way, both_ways = _swapped(p, others)
    if not enough:
        yield from both_ways
        return
    if p.right_norm:
        factor, left = _fit(p.ours, p.right)
        text = times(p, factor, left, p.our_norm, multiples)
        if text == "of the wrong sign":
            yield Guess("sign", f"is {text}", left, p.our_norm)
        # Any two scalars differ by a factor: if both went astray, that says more.
        yield from both_ways
        yield Guess("factor", f"is {text}", left, p.our_norm)
    if p.claimed.size > 1:
        yield from one_way
        if p.right_norm:
            yield from _slices(p)
            yield from _rearranged(p, multiples)
            yield from _entries(p)
    shift = float(np.mean(p.off))
    yield constant(p, shift, _norm(p.off - shift))


def _swapped(p: _Pair, others: Others) -> tuple[list[Guess], list[Guess]]:
    """Another leaf's gradient: that stands here, ours there, or both."""
    claimed, right = others
    one_way, both_ways = [], []
    for other in dict.fromkeys([*claimed, *right]):
        ways = []
        if other in right and np.shape(right[other]) == p.claimed.shape:
            source = p.part(right[other])
            seen = np.isfinite(source)
            left, size = _norm((p.ours - source)[seen]), _norm(source[seen])
            ways.append(Guess("swapped", f"is that of `{other}`", left, size))
        if other in claimed and np.shape(claimed[other]) == p.claimed.shape:
            left, size = _norm(p.part(claimed[other]) - p.right), p.right_norm
            ways.append(Guess("swapped", f"stands under `{other}`", left, size))
        ways = [way for way in ways if 0 < way.size < np.inf]
        one_way += ways
        if len(ways) == 2:
            worse = max(way.residual / way.size for way in ways)
            text = f"and that of `{other}` are swapped"
            both_ways.append(Guess("swapped", text, worse, 1.0, loosely=False))
    return one_way, both_ways


def _axes(p: _Pair) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Rows (of the leading axis) and columns (of the last), with the other axes."""
    axes = range(p.claimed.ndim)
    if len(axes) > 1:
        yield "rows", tuple(axes[1:])
        yield "columns", tuple(axes[:-1])


def _slices(p: _Pair) -> Iterator[Guess]:
    """Each row or column has its own factor."""
    ours, right = p.whole(p.ours), p.whole(p.right)
    for kind, others in _axes(p):
        squares = np.square(right).sum(others, keepdims=True)
        factors = (ours * right).sum(others, keepdims=True)
        factors = np.where(squares, factors, 1) / np.where(squares, squares, 1)
        rest = factors * right
        np.subtract(ours, rest, out=rest)
        rest /= np.maximum(1, np.abs(factors))
        left = _norm(rest)
        wrong = np.abs(factors - 1) * np.sqrt(squares)
        wrong = wrong > max(p.noise * p.right_norm, left)
        numbers = np.count_nonzero(right, others, keepdims=True)[wrong].sum()
        # A row of one number fits any factor.
        if numbers >= 2 * wrong.sum() > 0:
            texts = [*dict.fromkeys(f"{factor:.6g}" for factor in factors[wrong])]
            times = ", ".join(texts[:4] + ["..."] * (len(texts) > 4))
            which = _which(kind, wrong)
            text = f"is wrong by a factor in {which}: {times} times what it should be"
            yield Guess(kind, text, left, min(p.our_norm, p.right_norm))


def _which(kind: str, hit: npt.NDArray[np.bool_]) -> str:
    places = [str(place) for place in np.flatnonzero(hit)]
    noun = kind if len(places) > 1 else kind[:-1]
    return f"{noun} {_listed(places[:5], len(places))} of {hit.size}"


def _listed(texts: Sequence[str], count: int) -> str:
    """Writes the first few of `count` texts: `a, b and c`, or `a, b and 7 more`."""
    if count > len(texts):
        texts = [*texts, f"{count - len(texts)} more"]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _rearranged(p: _Pair, multiples: Mapping[int, str]) -> Iterator[Guess]:
    """The right numbers in another order, times a factor."""
    if p.all_known:
        # No order brings two lists closer than if both are sorted: so if that isn't
        # close, none needs a trial. By absolute values, for factors below 0.
        _, left = _fit(np.sort(np.abs(p.ours)), np.sort(np.abs(p.right)))
        if left > max(p.noise * p.our_norm, p.near(p.our_norm)):
            return
    for kind, restored, text in _orders(p):
        target = restored.ravel()[p.known]
        size = _norm(target)
        factor, left = _fit(target, p.right)
        said = times(p, factor, left, size, multiples)
        yield Guess(kind, f"{text}, and {said}" if said else text, left, size)
    # Large samples of one distribution, sorted, agree to about 1 / sqrt(size).
    if p.all_known and p.noise < 1e-2 / np.sqrt(p.right.size):
        left = _norm(np.sort(p.ours) - np.sort(p.right))
        text = "holds the right numbers in another order"
        yield Guess("permuted", text, left, p.right_norm, loosely=False)


def _orders(p: _Pair) -> Iterator[tuple[str, Array, str]]:
    """Orders that the claimed gradient may be in, each undone."""
    shape, axes = p.claimed.shape, range(p.claimed.ndim)
    for order in itertools.islice(itertools.permutations(axes), 720):
        long = [axis for axis in order if shape[axis] > 1]
        if long != sorted(long):
            mixed = tuple(shape[axis] for axis in order)
            text = "is transposed" if len(long) == 2 else f"has its axes as {order}"
            if mixed != shape:
                text = f"has its numbers laid out as shape {mixed}"
            restored = p.claimed.reshape(mixed).transpose(np.argsort(order))
            yield "transposed", restored, text
    # Where the largest number of the reference went.
    spot = int(np.nanargmax(np.abs(p.reference)))
    found = int(np.argmin(np.abs(p.claimed - p.reference.flat[spot])))
    moves = np.subtract(np.unravel_index(found, shape), np.unravel_index(spot, shape))
    for axis in (*axes, None) if len(axes) > 1 else axes:
        move = found - spot if axis is None else int(moves[axis])
        where = "as a flat list" if axis is None else f"along axis {axis}"
        for shift in dict.fromkeys([1, -1, move]):
            restored = np.roll(p.claimed, -shift, axis)
            yield "permuted", restored, f"is rolled by {shift} {where}"
        yield "permuted", np.flip(p.claimed, axis), f"is reversed {where}"


def _entries(p: _Pair) -> Iterator[Guess]:
    """Some entries are wrong and the others, at least as many, right.

    A half is enough, since no number is right by chance; zeros don't count, since
    those of a sparse gradient are right in any case.
    """
    off = np.abs(p.off)
    ordered = np.sort(off)
    tails = np.sqrt(np.cumsum(ordered**2))
    most = np.count_nonzero((p.ours != 0) | (p.right != 0)) // 2
    for loosely in (False, True):
        limit = p.near(p.right_norm) if loosely else p.noise * p.right_norm
        wrong = off >= ordered[np.searchsorted(tails[:-1], limit, "right")]
        if np.count_nonzero(wrong) <= most:
            kind, text = _wrong_entries(p, wrong)
            # The others are right by their own measure, however large the wrong ones.
            size = _norm(p.right[~wrong]) if loosely else p.right_norm
            yield Guess(kind, text, _norm(off[~wrong]), size, loosely)


def _wrong_entries(p: _Pair, wrong: npt.NDArray[np.bool_]) -> tuple[str, str]:
    where, right = p.whole(wrong), p.whole(~wrong & ((p.ours != 0) | (p.right != 0)))
    for kind, others in _axes(p):
        hit = np.asarray(where.any(others))
        if not (hit & right.any(others)).any() and wrong.sum() >= 2 * hit.sum():
            return kind, f"is wrong in {_which(kind, hit)}, and right in the others"
    places = np.argwhere(where)
    first = tuple(places[0])
    texts = [str(place.tolist()) for place in places[:3]]
    measured = "" if p.all_known else " that were measured"
    return "entries", (
        f"is wrong in {len(places)} of {wrong.size} entries{measured}, and right in "
        f"the others: wrong at {_listed(texts, len(places))}; {texts[0]} is "
        f"{p.claimed[first] * p.unit:.6g} and should be "
        f"{p.reference[first] * p.unit:.6g}"
    )


def _missing(p: _Pair, contributions: Parts | Callable[[], Parts]) -> Iterator[Guess]:
    """The reference is a sum, of which some terms are missing."""
    terms = contributions() if callable(contributions) else contributions
    if len(terms) < 2 or p.right.size < 2 or not p.right_norm:
        return
    rows = [p.part(term) for _, term in terms]
    weights = _weights(p, rows)
    for kept in _subsets(len(rows)) if weights is None else [weights]:
        if kept.all() or not kept.any():
            continue
        lost = [row * (1 - k) for row, k in zip(rows, kept, strict=True) if k != 1]
        factor, left = _fit(p.ours, p.right - np.sum(lost, axis=0))
        lacking = [label for (label, _), k in zip(terms, kept, strict=True) if not k]
        text = f"lacks {_folded(lacking)}"
        counted = [f"{factor * k:.4g}" for k in np.unique(kept[kept != 0])]
        if counted != ["1"]:
            text += f", and counts the rest {_listed(counted, len(counted))} times"
        yield Guess("missing_term", text, left, p.right_norm)


def _weights(p: _Pair, rows: Sequence[Array]) -> Array | None:
    """How often each term counts, by least squares; `None` if that isn't determined.

    All ones if it's no whole number of times, and not equally often for those that
    aren't missing (as in a mean over fewer rows).
    """
    sizes = np.array([_norm(row) for row in rows])
    seen = sizes > 0  # a term that is zero can't be seen to be missing
    matrix = np.array([row / _norm(row) for row in rows if row.any()])
    gram = matrix @ matrix.T
    if not 0 < len(matrix) < p.right.size or np.linalg.cond(gram) > 1e10:
        return None
    weights = np.ones(len(rows))
    weights[seen] += np.linalg.solve(gram, matrix @ p.off) / sizes[seen]
    kept = np.abs(weights) > 1e-3
    whole = np.rint(weights)
    if np.abs(weights - whole).max() <= 1e-3:
        return whole
    equal = np.ptp(weights[kept]) <= 1e-3
    return kept.astype(float) if equal else np.ones(len(rows))


def _subsets(count: int) -> list[Array]:
    """Each term missing, and either half."""
    places = np.arange(count)
    halves = [places < (count + 1) // 2, places >= count // 2]
    return [*(1 - np.eye(count)), *(half.astype(float) for half in halves)]


def _folded(labels: Sequence[str]) -> str:
    """Lists labels, with runs of numbers folded: `rows 4 to 7`."""
    runs: list[list[str]] = []
    for label in labels:
        number = re.split(r"\D", label)[-1]
        stem = label.removesuffix(number)
        follows = runs and number and runs[-1][0] == stem
        if follows and int(runs[-1][-1]) + 1 == int(number):
            runs[-1].append(number)
        else:
            runs.append([stem, number])
    texts = [
        f"{run[0].rstrip()}s {run[1]} to {run[-1]}" if len(run) > 2 else "".join(run)
        for run in runs
    ]
    return _listed(texts[:5], len(texts))


def _unknown(p: _Pair) -> str:
    if not p.right_norm:
        wrong = f"{np.count_nonzero(p.ours)} of {p.ours.size} entries aren't"
        return f"should be zero, and {wrong}"
    size = f"{100 * p.off_norm / p.right_norm:.3g} % of its norm"
    cosine = float(np.vdot(p.ours, p.right)) / (p.our_norm * p.right_norm or 1.0)
    return f"differs by {size} (cosine {cosine:.3g}), and no simple cause fits"
