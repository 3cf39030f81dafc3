"""Derivatives from function values alone: the limit that defines them, as h shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.gradients import differentiate, jit_general, once_per_loss
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    as_params,
    combine,
    kind_of,
    loss_and_aux,
    partition,
    split_static,
)
from jaxgrad.tables import Report, Table, number


@dataclass(frozen=True)
class Difference:
    """Two estimates of a derivative at one step `h`, with their absolute errors."""

    h: float
    forward: float
    forward_error: float
    central: float
    central_error: float


@dataclass(frozen=True, eq=False, repr=False)
class DifferenceTable(Report):
    """How well differences estimate a derivative, step by step.

    Attributes:
      dtype: the dtype that all was computed in.
      exact: the derivative by `jax.grad`, in float64.
      rows: one per step `h`, the largest first.
      best_forward: the row whose forward difference errs least.
      best_central: the row whose central difference errs least.
    """

    dtype: str
    exact: float
    rows: tuple[Difference, ...]
    best_forward: Difference
    best_central: Difference

    def tables(self) -> list[Table]:
        """One row per step, and a line on the best ones."""
        return [
            Table(
                f"Differences in {self.dtype}; the exact derivative is "
                f"{number(self.exact)}",
                [">h", ">(L(w+h)-L(w))/h", ">error", ">(L(w+h)-L(w-h))/2h", ">error"],
                [
                    [
                        number(row.h),
                        number(row.forward, 8),
                        number(row.forward_error, 2),
                        number(row.central, 8),
                        number(row.central_error, 2),
                    ]
                    for row in self.rows
                ],
                f"Best h: {number(self.best_forward.h)} for the forward difference, "
                f"{number(self.best_central.h)} for the central one. Above it the "
                "formula's own error rules, below it rounding does.",
            )
        ]


def difference_table(
    loss: Loss,
    params: PyTree,
    *args: Any,
    direction: PyTree = None,
    dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
) -> DifferenceTable:
    r"""Estimates a derivative by differences, with ever smaller steps.

    The derivative is $\lim_{h \to 0} (L(w + h d) - L(w)) / h$ along a direction $d$.
    With exact numbers the forward difference errs by $O(h)$ and the central one,
    $(L(w + h d) - L(w - h d)) / 2h$, by $O(h^2)$. With $\epsilon$ the dtype's rounding
    error, rounding adds $O(\epsilon / h)$, so that the error falls first and rises
    again: the best $h$ is near $\sqrt\epsilon$, or $\sqrt[3]\epsilon$ for the central
    difference, times the scale of $w$.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree.
      *args: the rest of the loss's arguments.
      direction: $d$, with the structure of a gradient of `params`; `None` is 1 in every
        entry, which for a single number gives its derivative.
      dtype: what to compute in; `None` is the dtype of the first leaf that has one.
        `float64` works whatever JAX's configuration, which stays as it is.
      has_aux: the loss returns `(loss, aux)`.

    Returns:
      A `DifferenceTable`, with a step for each power of ten from 1 to below the dtype's
      rounding error.

    Raises:
      ValueError: the direction's structure isn't that of the gradient.
      TypeError: as `value_and_grad`; or a dtype that isn't floating.

    Example:
      >>> import jaxgrad
      >>> table = jaxgrad.difference_table(lambda w: w**2, 3.0)
      >>> table.exact, table.rows[0].forward, table.rows[0].central
      (6.0, 7.0, 6.0)

    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, section 8.1.
    """
    params = as_params(params)
    trained, held = partition(params)
    if dtype is None:
        dtype = jnp.result_type(jax.tree.leaves(trained)[0])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, and is {jnp.dtype(dtype)}.")
    dtype = jnp.dtype(dtype)
    if direction is None:
        direction = jax.tree.map(np.ones_like, trained)
    same = jax.tree.structure(direction) == jax.tree.structure(trained)  # type: ignore[operator]
    if not same or jax.tree.map(np.shape, direction) != jax.tree.map(np.shape, trained):
        raise ValueError(
            "direction must have the structure and shapes of the gradient, "
            f"{jax.tree.map(np.shape, trained)}, and has "
            f"{jax.tree.map(np.shape, direction)}."
        )
    direction = jax.tree.map(lambda d: np.asarray(d, np.float64), direction)
    with jax.enable_x64(True), np.errstate(all="ignore"):
        evaluate = _evaluator(loss, has_aux)
        wide = _cast((trained, direction, args), np.dtype(np.float64))
        exact = evaluate.slope(*split_static((held, *wide)))
        narrow = _cast((trained, direction, args), dtype)

        def at(h: Any) -> Any:
            point = jax.tree.map(lambda w, d: w + h * d, narrow[0], narrow[1])
            value = evaluate.value(*split_static((held, point, narrow[2])))
            return np.asarray(value).astype(dtype)

        here = at(dtype.type(0))
        eps = float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]
        digits = math.floor(-math.log10(eps)) + 1
        rows = []
        for power in range(digits + 1):
            h = dtype.type(10.0**-power)
            ahead, behind = at(h), at(-h)
            forward, central = (ahead - here) / h, (ahead - behind) / (h + h)
            rows.append(
                Difference(
                    h=10.0**-power,
                    forward=float(forward),
                    forward_error=abs(float(forward) - float(exact)),
                    central=float(central),
                    central_error=abs(float(central) - float(exact)),
                )
            )
    return DifferenceTable(
        dtype=dtype.name,
        exact=float(exact),
        rows=tuple(rows),
        best_forward=min(rows, key=lambda row: row.forward_error),
        best_central=min(rows, key=lambda row: row.central_error),
    )


@dataclass(frozen=True)
class Slope:
    """A derivative along a direction, from values of the loss alone.

    Attributes:
      value: the central, extrapolated estimate.
      error: how far off it may be: the disagreement of three neighbouring steps, and
        what rounding in the values explains.
      ahead, behind: the one-sided derivatives, of $f(h)$ for $h > 0$ and $h < 0$.
      kink: whether they differ in the limit.
      rounding: the rounding error of the values.
      others: what some steps say that contradicts `value`, each with its error: where
        the loss changes in stairs or waves, it's open which of them is the slope.
    """

    value: float
    error: float
    ahead: float
    behind: float
    kink: bool
    rounding: float = 0.0
    others: tuple[tuple[float, float], ...] = ()

    def over(self, length: float) -> Slope:
        """The derivative along a direction that is shorter by a factor."""
        value, error = self.value / length, self.error / length
        ahead, behind = self.ahead / length, self.behind / length
        others = tuple((v / length, e / length) for v, e in self.others)
        return Slope(value, error, ahead, behind, self.kink, self.rounding, others)


LADDER = tuple(0.16 * 4.0**-j for j in range(16))
"""Steps to try, as shares of the scale: a wide relu net needs 1e-5, a point beside the
edge of a domain or a kink less, and a loss with noise in its digits 1e-2 or more."""

# Three neighbouring estimates in the regime of a power law err by no more than their
# spread; where rounding rules, their spread is its size only up to luck.
_SAFETY = 3


def slope_of(
    steps: Sequence[float],
    ahead: np.ndarray,
    behind: np.ndarray,
    least: float,
    quantum: float,
) -> Slope:
    r"""The derivative of $f$ at 0 from $f(h)$ and $f(-h)$, less $f(0)$, at steps $h$.

    Central differences $D(h)$, and $(16 D(h/4) - D(h)) / 15$, whose error is $O(h^4)$.
    The step is the one at which three neighbours agree best, since the formula's own
    error falls as $h$ does and that of rounding grows. The rounding error of a value is
    what $f(h) + f(-h) - 2 f(0)$ leaves at the smallest steps.

    Args:
      steps: $h$, each a quarter of the one before.
      ahead: $f(h) - f(0)$ at each.
      behind: $f(-h) - f(0)$ at each.
      least: their rounding error, at least.
      quantum: a change that may be lost in rounding, where none is seen at all.

    Source: Ridders, Accurate computation of F'(x) and F'(x)F''(x), Advances in
    Engineering Software 4 (1982), who extrapolates to the same end.
    """
    with np.errstate(all="ignore"):
        h = np.asarray(steps)
        central = (ahead - behind) / (2 * h)
        bend = ahead + behind
        # Free of what is proportional to h and to h**2, so that rounding is left. The
        # root of the sum of the squared factors is 67; a bend has 6**0.5 roundings.
        noise = np.abs(bend[:-2] - 20 * bend[1:-1] + 64 * bend[2:])[-4:] / (67 * 6**0.5)
        noise = noise[np.isfinite(noise)]
        rounding = max(float(np.median(noise)) if len(noise) else 0.0, least)
        lost = rounding + np.where((ahead == 0) & (behind == 0), quantum, 0.0)
        # The parts in h, h**2 go out of one-sided slopes, that in h**2 out of central
        # ones. Before, there may be less error where the loss bends at every step.
        middles, bars = _windows([central, _without(central, 16)], h, lost)
        value, error = _best(middles, bars)
        others = tuple(
            (float(v), float(e))
            for v, e in zip(middles, bars, strict=True)
            if e <= 0.1 * abs(v) and abs(v - value) > e + error
        )
        sides = []
        for slopes in (ahead / h, -behind / h):
            once = _without(slopes, 4)
            sides.append(_best(*_windows([once, _without(once, 16)], h, lost)))
        kink = _is_kink(_without(ahead / h + behind / h, 4), lost[1:] / h[1:])
        if not math.isfinite(error):  # at the edge of a domain: the side inside of it
            value, error = min(sides, key=lambda side: side[1])
    if kink:
        value = (sides[0][0] + sides[1][0]) / 2
        error = max(sides[0][1], sides[1][1])
    return Slope(value, error, sides[0][0], sides[1][0], kink, rounding, others)


def _without(row: np.ndarray, factor: int) -> np.ndarray:
    """Extrapolates: without the part that falls by `factor` at each step."""
    return np.asarray((factor * row[1:] - row[:-1]) / (factor - 1))


def _windows(
    rows: Sequence[np.ndarray], steps: np.ndarray, rounding: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of any three neighbours: the middle one, and what it may be off by."""
    middles, bars = [], []
    for row in rows:
        if len(row) < 3:
            continue
        three = np.lib.stride_tricks.sliding_window_view(row, 3)
        finest = (rounding / steps)[len(steps) - len(three) :]
        middles.append(three[:, 1])
        bars.append(_SAFETY * (three.max(1) - three.min(1) + finest))
    return np.concatenate(middles), np.concatenate(bars)


def _best(middles: np.ndarray, bars: np.ndarray) -> tuple[float, float]:
    """The estimate whose neighbours agree best, and what it may be off by."""
    bars = np.where(np.isfinite(middles) & np.isfinite(bars), bars, math.inf)
    best = int(np.argmin(bars))
    return float(middles[best]), float(bars[best])


def _is_kink(gaps: np.ndarray, noise: np.ndarray) -> bool:
    """Whether the gap between one-sided slopes stays as the step shrinks.

    It is read at the three smallest steps whose noise is below 1 % of it; there it must
    be the same to 3 %. A kink beside the point has a gap that grows with the step, and
    curvature one that falls with it.
    """
    for place in range(len(gaps) - 2, 0, -1):
        window = gaps[place - 1 : place + 2]
        size = np.abs(window).min()
        if np.isfinite(window).all() and 4 * noise[place + 1] < 0.01 * size:
            return bool(np.ptp(window) < 0.03 * size)
    return False


@dataclass(frozen=True)
class _Evaluator:
    value: Callable[..., Any]
    slope: Callable[..., Any]


def _evaluator(loss: Loss, has_aux: bool) -> _Evaluator:
    """The compiled loss, and its derivative along a direction."""

    def build(get_loss: Callable[[], Loss]) -> _Evaluator:
        def value(operands: tuple[Any, ...]) -> Any:
            held, trained, args = operands
            output = get_loss()(combine(trained, held), *args)
            return loss_and_aux(get_loss(), output, has_aux)[0]

        def slope(operands: tuple[Any, ...]) -> Any:
            held, trained, direction, args = operands
            params = combine(trained, held)
            _, _, gradient = differentiate(get_loss(), params, args, has_aux)
            products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
            return sum(jax.tree.leaves(products))

        return _Evaluator(jit_general(value), jit_general(slope))

    return once_per_loss(loss, ("differences", has_aux), build)


def _cast(tree: PyTree, dtype: np.dtype[Any]) -> PyTree:
    """NumPy arrays of one dtype for all arrays of floats."""
    return jax.tree.map(
        lambda leaf: (
            np.asarray(leaf).astype(dtype)
            if kind_of(leaf) == "differentiable"
            else leaf
        ),
        tree,
    )
