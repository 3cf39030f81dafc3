"""`plot_gradient_flow`: the norm of the gradient, leaf by leaf through a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxgrad.pictures.axes import BLUE, VERMILLION, drawable, labels
from jaxgrad.pytrees import PyTree, as_params, is_array, kind_of, leaf_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_gradient_flow(gradient: PyTree, axes: Axes | None = None) -> Figure:
    r"""Draws the norm of the gradient in each leaf, on a logarithmic scale.

    Each leaf is a marker at its norm $\sqrt{\sum_i g_i^2}$, in a row of its own, in the
    order of the tree; of many rows only every few are named. A norm that a logarithmic
    scale doesn't have is a marker of its own kind, named zero, inf or NaN.

    Args:
      gradient: the tree that `jaxgrad.grad` returns, or an object that isn't a tree and
        has one as its attribute `gradient`, such as a `GradientTrace`.
      axes: where to draw; `None` makes a new figure, 6 inches wide and 4 to 12 high.

    Returns:
      The matplotlib `Figure`, which a notebook shows, and `savefig` saves.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> figure = jaxgrad.plot_gradient_flow({"w": jnp.ones(3), "b": jnp.zeros(1)})
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['b', 'w']

    Source: Glorot and Bengio 2010, section 4.2,
    https://proceedings.mlr.press/v9/glorot10a.html
    """
    if jax.tree_util.all_leaves([gradient]) and not is_array(gradient):
        gradient = getattr(gradient, "gradient", gradient)
    named = jax.tree_util.tree_leaves_with_path(as_params(gradient))
    for path, leaf in named:
        if kind_of(leaf) != "differentiable":
            raise TypeError(
                f"Leaf `{leaf_name(path)}` is a {type(leaf).__name__}, not an array "
                "of floats: give what `jaxgrad.grad(loss)(params, *args)` returns."
            )
    if not named:
        raise ValueError("The gradient has no leaves, so there is nothing to draw.")
    count = len(named)
    axes = drawable(axes, height=min(max(4.0, 0.25 * count), 12.0))
    norms = [np.linalg.norm(np.ravel(leaf).astype(np.float64)) for _, leaf in named]
    x, y = np.array(norms), np.arange(count)
    on = np.isfinite(x) & (x > 0)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.plot(x[on], y[on], "o", color=BLUE)
    for name, place, marker, off in (
        ("zero", 0.02, "<", x == 0),
        ("NaN", 0.5, "X", np.isnan(x)),
        ("inf", 0.98, ">", np.isinf(x)),
    ):
        if off.any():
            across = axes.get_yaxis_transform()  # from 0 at the left to 1 at the right
            (marks,) = axes.plot(np.full(off.sum(), place), y[off], transform=across)
            marks.set(linestyle="", marker=marker, color=VERMILLION, label=name)
    axes.set(xlabel="2-norm of the gradient", ylim=(count - 0.5, -0.5))
    axes.set_title("Gradient flow", fontsize="medium")
    room = axes.get_window_extent().height / axes.figure.figure.dpi / 0.19
    every = int(np.ceil(count / room))
    axes.set_yticks(y[::every], labels(leaf_name(path) for path, _ in named)[::every])
    axes.tick_params(axis="y", labelsize="small")
    axes.grid(axis="y", alpha=0.4)
    if not on.all():
        axes.legend(loc="best", fontsize="small")
    return axes.figure.figure
