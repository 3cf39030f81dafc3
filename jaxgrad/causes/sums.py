"""Causes that sums over a gradient can tell, where it can't be held as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Sums:
    """A claimed gradient and the right one, by sums over all of their entries.

    Attributes:
      our_norm, right_norm, off_norm: the 2-norms of both, and of their difference.
      size: how many entries there are.
      nonzero: how many aren't zero in both.
      noise: the uncertainty of the numbers, as a share of their 2-norm.
      factor, unlike: what brings the right one closest, and the 2-norm of the rest.
      shift, uneven: what is added to each entry, and the 2-norm of the rest.
      wrong: how many entries are wrong, if that is known.
      others_off: the 2-norm of the other entries' errors.
      worst: the worst entry: its index, the number claimed, the right one.
      elsewhere: by the name of another leaf, the 2-norm of what its claimed gradient
        differs by from the right one of this.
      whole: whether these are all of the entries, or a sample.
      unit: what all numbers are multiples of.
    """

    our_norm: float
    right_norm: float
    off_norm: float
    size: int
    nonzero: int
    noise: float
    factor: float
    unlike: float
    shift: float
    uneven: float
    wrong: int | None
    others_off: float
    worst: tuple[tuple[int, ...], float, float] | None
    elsewhere: Mapping[str, float]
    whole: bool
    unit: float = 1.0

    def near(self, size: float) -> float:
        """As for whole gradients."""
        return bulk(self.size) * min(self.off_norm, size)


def find_cause_by_sums(
    name: str, sums: Sums, *, counts: Mapping[str, int] | None = None
) -> Cause:
    """As `find_cause`, of gradients that are too large, or too far apart, to be held.

    What takes the whole of them, such as another order of the entries, isn't tried.
    """
    who = f"The gradient of `{name}`"
    found = first(who, sums, _by_sums(sums, multiples(counts or {})))
    if found is not None:
        return found
    if not sums.right_norm:
        text = "should be zero, and isn't"
    else:
        part = 100 * sums.off_norm / sums.right_norm
        text = f"differs by {part:.3g} % of its norm, and no simple cause fits"
    return Cause("unknown", f"{who} {text}.")


def _by_sums(s: Sums, multiples: Mapping[int, str]) -> Iterator[Guess]:
    """The hypotheses that sums can test, the simplest first."""
    yield zero(s, s.whole and s.our_norm <= s.noise * s.right_norm)
    if s.right_norm:
        text = times(s, s.factor, s.unlike, s.our_norm, multiples)
        kind = "sign" if text == "of the wrong sign" else "factor"
        yield Guess(kind, f"is {text}", s.unlike, s.our_norm)
    for other, gap in s.elsewhere.items():
        yield Guess("swapped", f"stands under `{other}`", gap, s.right_norm)
    if s.wrong and s.worst and s.wrong <= s.nonzero // 2:
        index, ours, right = s.worst
        text = (
            f"is wrong in {s.wrong} of {s.size} entries, and right in the others: "
            f"{list(index)} is {ours:.6g} and should be {right:.6g}"
        )
        yield Guess("entries", text, s.others_off, s.right_norm)
    yield constant(s, s.shift, s.uneven)
