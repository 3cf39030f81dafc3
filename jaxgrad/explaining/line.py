"""Searches the loss along a line: where it is lowest, where it rises again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Learning rates tried, each 1.19 times the one before (four to a factor of 2): a rise
# and fall of the loss in less may be missed. 160 of them span a factor of 1e12; a wider
# span is thinned.
_RATES = 160


class Line(NamedTuple):
    """What was found; the first four are fields of `StepExplanation`."""

    best_rate: float | None
    first_rise: float | None
    largest_rate: float
    rounding: float
    lowest: float
    """The lowest value below `first_rise`."""


def along(
    phi: Callable[[float], float],
    here: float,
    rate: float,
    lengths: Sequence[float],
    eps: float,
    coarsest: float,
) -> Line:
    """Looks for the best learning rate and the first rise, in less than 300 values.

    `phi` is the loss by the learning rate, `here` its value at 0. Something should
    happen at one of `lengths`: the search starts at a quarter of the least and ends at
    1024 times the greatest, and at `rate`. `eps` is the rounding error of the loss's
    dtype, `coarsest` that of the parameter with the fewest digits.
    """
    seen = {0.0: here}

    def at(rate: float) -> float:
        if rate not in seen:
            value = phi(rate)
            seen[rate] = value if math.isfinite(value) else math.inf
        return seen[rate]

    least, greatest = min(lengths) / 4, 1024 * max(lengths)
    # The rounding of the loss, from 9 values in a row: fourth differences take out what
    # is smooth, and are sqrt(70) times as large as an error of the values.
    h = math.sqrt(max(eps, coarsest)) * least / 2
    with np.errstate(all="ignore"):
        fourth = np.diff([at(j * h) for j in range(9)], 4)
        noise = math.sqrt(float(np.mean(np.square(fourth))) / 70)
    rounding = max(2 * eps * abs(here), 4 * noise if math.isfinite(noise) else 0.0)

    count = min(_RATES, math.ceil(4 * math.log2(greatest / least)) + 1)
    first_rise, points = None, [0.0]
    for t in sorted({*np.geomspace(least, greatest, count).tolist(), rate}):
        if at(t) > here + rounding:
            first_rise = t
            break
        points.append(t)
    for _ in range(60):  # halve what lies between
        if first_rise is None or first_rise - points[-1] <= 1e-7 * first_rise:
            break
        middle = (points[-1] + first_rise) / 2
        if at(middle) > here + rounding:
            first_rise = middle
        else:
            points.append(middle)

    best = min(points, key=at)
    place = points.index(best)
    points += [] if first_rise is None else [first_rise]
    falls_on = best == points[-1]
    if 0 < place < len(points) - 1:
        best = _lowest(at, points[place - 1 : place + 2], eps, rounding)
    return Line(
        best_rate=best if here - at(best) > rounding and not falls_on else None,
        first_rise=first_rise,
        largest_rate=max(seen),
        rounding=rounding,
        lowest=at(best),
    )


def _lowest(
    at: Callable[[float], float], bracket: list[float], eps: float, rounding: float
) -> float:
    """The lowest point of a bracket: halved around its lowest, then a parabola.

    A parabola through points at a distance of d errs by about d**2 where the loss isn't
    one, and by eps / d for the rounding of its values: cbrt(eps) balances the two.
    """
    a, b, c = bracket
    while c - a > math.cbrt(eps) * c:
        row = [a, (a + b) / 2, b, (b + c) / 2, c]
        place = min((1, 2, 3), key=lambda i: at(row[i]))
        a, b, c = row[place - 1 : place + 2]
    one, two = (b - a) * (at(b) - at(c)), (b - c) * (at(b) - at(a))
    if math.isfinite(one - two) and one != two:
        vertex = b - ((b - a) * one - (b - c) * two) / (one - two) / 2
        if a < vertex < c and at(vertex) <= at(b) + rounding:
            return vertex
    return b
