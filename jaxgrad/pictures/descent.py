"""`plot_descent`: the loss over one or two parameters, and how descent goes over it."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxgrad.gradients import value_and_grad
from jaxgrad.pictures.axes import BLUE, LARGEST, VERMILLION, drawable, labels, loss_at
from jaxgrad.pytrees import Loss, PyTree, as_params, leaf_name, partition
from jaxgrad.sgd import Schedule, init_sgd, sgd_update
from jaxgrad.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_descent(
    loss: Loss,
    params: PyTree,
    *args: Any,
    entries: str | Sequence[str] | None = None,
    path: Iterable[PyTree] | None = None,
    learning_rate: float | Float[ArrayLike, ""] | Schedule | None = None,
    steps: int = 20,
    has_aux: bool = False,
    axes: Axes | None = None,
) -> Figure:
    r"""Draws the loss over one or two parameters, and how descent goes over it.

    At each point of the path an arrow shows $-c \, \partial L / \partial p$ there, with
    one $c$ for the whole picture; over one parameter the arrow lies on the tangent.

    The curve or the contours are a slice: the parameters that aren't drawn are held at
    the path's last point, so that earlier points may lie off the curve.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree. Descent starts here; with `path` it only gives the structure.
      *args: the rest of the loss's arguments.
      entries: the one or two parameters to draw over, by name, such as
        `layers[0].weight[3][2]`; a leaf that is a single number has no index, and
        `params[1]` is an entry of an array alone. `None` takes all, if there are two
        or one.
      path: the points that training took, each with the structure of `params`.
      learning_rate: of `sgd_update`, which makes the path where none is given.
      steps: how many updates it makes.
      has_aux: the loss returns `(loss, aux)`.
      axes: where to draw; `None` makes a new figure of 6 by 4 inches.

    Returns:
      The matplotlib `Figure`, which a notebook shows, and `savefig` saves. Where the
      loss isn't finite the curve has a gap and contours are grey. The path ends before
      a point without a finite loss and gradient, which the title then names.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
      >>> x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
      >>> figure = jaxgrad.plot_descent(jaxgrad.linear_loss, params, x, y,
      ...     entries=["weight[0][0]", "weight[0][2]"], learning_rate=0.01)
      >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
      ('weight[0][0]', 'weight[0][2]')

    Source: Goodfellow, Vinyals and Saxe 2015, Qualitatively characterizing neural
    network optimization problems, https://arxiv.org/abs/1412.6544
    """
    params = as_params(params)
    trained = partition(params)[0]
    chosen = _choose(trained, entries)
    axes, places, count = drawable(axes), list(chosen.values()), len(chosen)
    if (path is None) == (learning_rate is None):
        raise ValueError("Give either the path or a learning_rate that makes it.")
    if path is None:
        path = _descend(loss, params, args, learning_rate, steps, has_aux)
    rows, notes, last = [], [], params
    structure: Any = jax.tree.structure(params)
    for step, params in enumerate(map(as_params, path)):
        other: Any = jax.tree.structure(params)
        if other != structure:
            raise ValueError(
                f"Point {step} of the path has the structure {other}; that of params, "
                f"{structure}, was expected."
            )
        value, gradient = value_and_grad(loss, has_aux)(params, *args)
        trees = jax.tree.leaves(partition(params)[0]), jax.tree.leaves(gradient)
        found = [leaves[place][index] for leaves in trees for place, index in places]
        row = np.array([*found, value[0] if has_aux else value], np.float64)
        if not (np.abs(row) < LARGEST).all():
            notes.append(f"loss or gradient not finite at point {step}")
            break
        rows.append(row)
        last = params
    if not rows:
        raise ValueError(f"No path to draw: {''.join(notes) or 'it has no points'}.")
    points, slopes, losses = np.split(np.array(rows), [count, -1], axis=1)
    low, high = points.min(0), points.max(0)
    size = np.maximum(np.abs(low), np.abs(high))
    half = np.where(high > low, 0.75 * (high - low), 0.5 * np.where(size > 0, size, 1))
    half = np.maximum(half, 1e-4 * size)  # float32 has no finer curve
    middle = (low + high) / 2
    sides = np.linspace(middle - half, middle + half, 401 if count == 1 else 81).T
    grid = np.stack(np.meshgrid(*sides), axis=-1)
    flat = loss_at(loss, has_aux, (last, *args), places, grid.reshape(-1, count))
    values = flat.reshape(grid.shape[:-1])
    if count == 1:
        axes.plot(sides[0], values, color=BLUE, linewidth=2, label="loss")
        spread = np.ptp([*losses[:, 0], *values[np.isfinite(values)]]) or 1.0
        points, slopes = np.hstack([points, losses]), np.hstack([slopes, slopes**2])
        _draw_path(axes, points, -slopes, np.append(2 * half, spread), "gray")
    else:
        _draw_contours(axes, sides, values)
        _draw_path(axes, points, -slopes, 2 * half, "white")
    if sum(map(np.size, jax.tree.leaves(trained))) > count:
        notes.append("other parameters held at the last point")
    title = "Training" if learning_rate is None else "Gradient descent"
    title += f", {len(points)} point{'s' if len(points) > 1 else ''}"
    axes.set_title("\n".join([title, *notes]), fontsize="medium")
    xlabel, ylabel = [*labels(chosen), "loss"][:2]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(loc="best", fontsize="small")
    return axes.figure.figure


def _descend(
    loss: Loss,
    params: PyTree,
    args: tuple[Any, ...],
    learning_rate: Any,
    steps: int,
    has_aux: bool,
) -> Iterator[PyTree]:
    """The points of gradient descent, the start among them."""
    state = init_sgd(params)
    yield params
    for _ in range(steps):
        _, gradient = value_and_grad(loss, has_aux)(params, *args)
        params, state = sgd_update(
            params, grads=gradient, state=state, learning_rate=learning_rate
        )
        yield params


def _choose(trained: PyTree, names: str | Iterable[str] | None) -> dict[str, Any]:
    """One or two entries by name; `None` is all that there are."""
    named = jax.tree_util.tree_leaves_with_path(trained)
    shapes = {leaf_name(path): np.shape(leaf) for path, leaf in named}
    there = ", ".join(f"`{leaf}` of shape {shape}" for leaf, shape in shapes.items())
    if names is None:
        names = [
            leaf + "".join(f"[{k}]" for k in index)
            for leaf, shape in shapes.items()
            for index in itertools.islice(np.ndindex(*shape), 3)
        ]
    chosen: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        for place, (leaf, shape) in enumerate(shapes.items()):
            found = re.fullmatch(re.escape(leaf) + r"\[(\d+)\]" * len(shape), name)
            index = tuple(map(int, found.groups())) if found else ()
            if found and all(map(operator.lt, index, shape)):
                chosen[name] = (place, index)
        if name not in chosen:
            raise ValueError(f"params has no entry `{name}`. It has {there}.")
    if len(chosen) not in (1, 2):
        raise ValueError(
            "A picture is over one or two parameters: name them, such as "
            f"entries=['weight[0][2]', 'bias[0]']. params has {there}."
        )
    return chosen


def _draw_contours(axes: Axes, sides: np.ndarray, values: np.ndarray) -> None:
    """Filled contours, each colour on an equal share of the picture."""
    from matplotlib.colors import BoundaryNorm

    axes.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]], facecolor="0.8")
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 13)))
    if len(levels) == 1:
        levels = levels + max(abs(levels[0]), 1) * np.array([-0.5, 0.5])
    shown = np.ma.masked_invalid(values)
    colours: Any = {"norm": BoundaryNorm(levels, 256), "cmap": "cividis"}
    filled = axes.contourf(*sides, shown, levels=levels, **colours)
    bar = axes.figure.colorbar(filled, ax=axes, label="loss", ticks=levels)
    bar.ax.set_yticklabels([number(level, 3) for level in levels])


def _draw_path(
    axes: Axes, points: np.ndarray, tips: np.ndarray, spans: np.ndarray, colour: str
) -> None:
    """The points, joined, with arrows of one scale, the longest 15 % of a side."""
    longest = np.abs(tips / spans).max()
    arrows = tips * (0.15 / longest if longest else 0.0)
    size = 3 if len(points) > 40 else 6
    axes.plot(*points.T, color=colour, linewidth=1)
    axes.plot(*points.T, "o", color="white", mec="black", markersize=size, label="path")
    axes.plot(*points[0], "D", color="white", mec="black", label="start")
    scaling: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
    axes.quiver(*points.T, *arrows.T, color=VERMILLION, zorder=3, **scaling)
    key: Any = {"marker": r"$\rightarrow$", "markersize": 12, "color": VERMILLION}
    axes.plot([], [], linestyle="", label="−gradient", **key)
    if axes.get_xscale() == "linear":  # long numbers run into each other
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    axes.update_datalim(points + arrows)
    axes.autoscale_view()
