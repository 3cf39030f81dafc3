"""`plot_tangent`: a loss of one number, its tangent, and secants that approach it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgrad.gradients import value_and_grad
from jaxgrad.pictures.axes import BLUE, COLOURS, LARGEST, VERMILLION, drawable, loss_at
from jaxgrad.pytrees import Loss, PyTree, as_params, partition
from jaxgrad.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def plot_tangent(
    loss: Loss,
    w: PyTree,
    *args: Any,
    steps: Iterable[float] = (2.0, 1.0, 0.5, 0.1),
    has_aux: bool = False,
    axes: Axes | None = None,
) -> Figure:
    r"""Draws a loss of one number, its tangent, and secants that approach it.

    The secant through $w$ and $w + h$ has the slope $(L(w + h) - L(w)) / h$. As $h$
    shrinks the slope becomes $dL/dw$, the tangent's, which is that of `jaxgrad.grad`.

    Args:
      loss: a pure function `loss(w, *args)` that returns a real scalar.
      w: a single number.
      *args: the rest of the loss's arguments.
      steps: $h$ of each secant, negative ones too; none for the tangent alone.
      has_aux: the loss returns `(loss, aux)`.
      axes: where to draw; `None` makes a new figure of 6 by 4 inches.

    Returns:
      The matplotlib `Figure`, which a notebook shows, and `savefig` saves. Where the
      loss isn't finite the curve has a gap; a line whose slope isn't finite is in the
      legend only.

    Example:
      >>> import jaxgrad
      >>> figure = jaxgrad.plot_tangent(lambda w: w**2, 3.0, steps=[1.0, 0.1])
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
      ['loss', 'h = 1: slope 7', 'h = 0.1: slope 6.1', 'tangent: slope 6']
    """
    w, steps = as_params(w), [float(h) for h in steps]
    leaf, *others = jax.tree.leaves(partition(w)[0])
    if others or np.shape(leaf) != ():
        raise ValueError("w must be a single number. Of several, use `plot_descent`.")
    for h in steps:
        if not 0 < abs(h) < LARGEST:
            raise ValueError(f"steps has h = {h}, which gives no second point.")
    drawn = drawable(axes)
    _, gradient = value_and_grad(loss, has_aux)(w, *args)
    slope, here = float(jax.tree.leaves(gradient)[0]), float(leaf)
    ends = here + np.array([*steps, 0.0])
    reach = np.ptp(ends) or 1.0
    grid = np.linspace(ends.min() - 0.6 * reach, ends.max() + 0.2 * reach, 401)
    points = np.append(grid, ends)[:, None]
    values = loss_at(loss, has_aux, (w, *args), [(0, ())], points)
    *heights, height = values[grid.size :]

    def draw_line(slope: float, name: str, **look: Any) -> None:
        with np.errstate(all="ignore"):
            y = height + slope * (grid - here)
        y = np.where(np.abs(y) < LARGEST, y, np.nan)
        drawn.plot(grid, y, label=f"{name}: slope {number(slope, 4)}", **look)

    drawn.plot(grid, values[: grid.size], color=BLUE, linewidth=2.5, label="loss")
    for k, (h, there) in enumerate(zip(steps, heights, strict=True)):
        colour, dash = COLOURS[k % len(COLOURS)], _DASHES[k % len(_DASHES)]
        secant = (there - height) / h
        draw_line(secant, f"h = {number(h)}", color=colour, linestyle=dash)
        drawn.plot([here + h], [there], "o", color=colour, markersize=5)
    draw_line(slope, "tangent", color=VERMILLION, linewidth=1.8)
    drawn.plot([here], [height], "D", color=VERMILLION, zorder=3)
    what = "Tangent and secants" if steps else "Tangent"
    drawn.set_title(f"{what} at w = {number(here)}", fontsize="medium")
    drawn.set(xlabel="w", ylabel="loss L(w)")
    drawn.legend(loc="best", fontsize="small")
    return drawn.figure.figure
