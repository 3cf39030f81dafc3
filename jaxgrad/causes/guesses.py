"""Hypotheses on why a gradient is wrong, and what a person is told of one that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

KINDS = (
    "factor",
    "sign",
    "zero",
    "transposed",
    "permuted",
    "swapped",
    "rows",
    "columns",
    "entries",
    "offset",
    "missing_term",
    "matmul_precision",
    "unknown",
)


@dataclass(frozen=True)
class Cause:
    """Why a gradient is wrong: `kind` is one of `KINDS`, `text` is for a person."""

    kind: str
    text: str


class Guess(NamedTuple):
    """What a hypothesis leaves unexplained: `residual`, of something of size `size`."""

    kind: str
    text: str
    residual: float
    size: float
    loosely: bool = True
    """Says if 99 % is enough."""


@runtime_checkable
class Facts(Protocol):
    """What is known of both gradients: their 2-norms, as multiples of a unit."""

    @property
    def our_norm(self) -> float:
        """Of the claimed one."""

    @property
    def right_norm(self) -> float:
        """Of the right one."""

    @property
    def off_norm(self) -> float:
        """Of their difference."""

    @property
    def noise(self) -> float:
        """The uncertainty, as a share of the norm."""

    @property
    def unit(self) -> float:
        """What all numbers are multiples of."""

    def near(self, size: float) -> float:
        """How much may be left if a hypothesis is to explain the bulk."""


def first(who: str, p: Facts, guesses: Iterable[Guess]) -> Cause | None:
    """The first guess that fits; else the first that explains the bulk."""
    loose = None
    for guess in guesses:
        if guess.residual <= p.noise * guess.size:
            return Cause(guess.kind, f"{who} {guess.text}.")
        near = guess.loosely and guess.residual <= p.near(guess.size)
        loose = guess if near and loose is None else loose
    if loose is None:
        return None
    left = f"{100 * loose.residual / p.off_norm:.1g} %"
    text = f"{who} {loose.text} (which leaves {left} unexplained)."
    return Cause(loose.kind, text)


def bulk(count: int) -> float:
    """What may be left, as a share.

    Of a handful of numbers one in a hundred fits by chance, so there it's less.
    """
    return 1e-2 if count > 5 else 1e-4


def zero(p: Facts, none: bool) -> Guess:
    """It is zero; `none`: in all entries, and not only in those that were measured."""
    what = "missing altogether" if none else "zero wherever it was measured"
    text = f"is {what}, and its norm should be {p.right_norm * p.unit:.3g}"
    return Guess("zero", text, p.our_norm, p.right_norm, loosely=False)


def constant(p: Facts, shift: float, left: float) -> Guess:
    """A number is added to all of its entries."""
    text = f"is off by a constant: {shift * p.unit:.6g} is added to every entry"
    return Guess("offset", text, left, max(p.our_norm, p.right_norm))


def multiples(counts: Mapping[str, int]) -> dict[int, str]:
    """What a factor may come from: a count, or the product of two."""
    names: dict[int, list[str]] = {}
    for name, count in counts.items():
        names.setdefault(count, []).append(f"the {name}")
    for one, two in itertools.combinations(counts, 2):
        if min(counts[one], counts[two]) > 1:
            product = f"the {one} times the {two}"
            names.setdefault(counts[one] * counts[two], []).append(product)
    return {n: " or ".join(names[n]) for n in names if n > 1}


def times(
    p: Facts,
    factor: float,
    left: float,
    size: float,
    multiples: Mapping[int, str],
) -> str:
    """Says a factor in words: by a name that fits as well as the number does."""
    slack = max(p.noise * size, left) / p.right_norm
    sign = "of the wrong sign" if factor < 0 else ""
    if abs(abs(factor) - 1) <= slack:
        return sign
    for n in dict.fromkeys([*multiples, 2]):
        large = abs(abs(factor) - n) <= slack
        if large or abs(abs(factor) - 1 / n) <= slack:
            why = (
                "as if a term counted twice" if large else "as if a factor were missing"
            )
            if n in multiples:
                it, loss = ("sum", "mean") if large else ("mean", "sum")
                why = (
                    f"and {n} is {multiples[n]}: a {it} where the loss takes the {loss}"
                )
            named = f"{n} times too {'large' if large else 'small'}, {why}"
            return f"{sign} and {named}" if sign else named
    return f"{factor:.6g} times what it should be"
