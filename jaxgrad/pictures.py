"""Pictures: a tangent as a limit, a descent over the loss, gradients layer by layer."""

from __future__ import annotations

import functools
import io
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxgrad.gradients import jit_general, once_per_loss, value_and_grad
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    as_params,
    combine,
    is_array,
    kind_of,
    leaf_name,
    loss_and_aux,
    partition,
    split_static,
)
from jaxgrad.sgd import Schedule, init_sgd, sgd_update
from jaxgrad.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that look different to all eyes: Okabe and Ito, Color universal design (2008).
_BLUE, _VERMILLION = "#0072B2", "#D55E00"
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")
_DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_CURVE, _SIDE = 401, 81  # points of a curve, and along each side of a contour plot
_LARGEST = 1e100  # what matplotlib can lay out

_Entry = tuple[int, tuple[int, ...]]  # a leaf's place, and an index in it


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

    Raises:
      ImportError: matplotlib isn't installed.
      TypeError: `axes` isn't a matplotlib `Axes`; and as `value_and_grad`.
      ValueError: `w` isn't a single number, or a step is 0, not finite, or too small
        to change `w`.

    Example:
      >>> import jaxgrad
      >>> figure = jaxgrad.plot_tangent(lambda w: w**2, 3.0, steps=[1.0, 0.1])
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
      ['loss', 'h = 1: slope 7', 'h = 0.1: slope 6.1', 'tangent: slope 6']

    Source: the limit in https://en.wikipedia.org/wiki/Derivative#Definition
    """
    w = as_params(w)
    leaf, *others = map(jnp.asarray, jax.tree.leaves(partition(w)[0]))
    if others or leaf.shape != ():
        raise ValueError(
            f"w must be a single number, and has the entries {_listed(w)}. To draw "
            "over one or two of them, use `plot_descent`."
        )
    steps = [float(h) for h in steps]
    for h in steps:
        with np.errstate(over="ignore"):
            there = leaf + jnp.asarray(h, leaf.dtype)
        if there == leaf or not jnp.isfinite(there):
            raise ValueError(
                f"steps has h = {h}, which gives no second point beside "
                f"w = {number(leaf)} in {leaf.dtype}."
            )
    axes = _axes(axes)
    value, gradient = value_and_grad(loss, has_aux)(w, *args)
    height = float(value[0] if has_aux else value)
    slope, here = float(jax.tree.leaves(gradient)[0]), float(leaf)

    ends = here + np.array([*steps, 0.0])
    reach = np.ptp(ends) if steps else 1.0
    grid = np.linspace(ends.min() - 0.6 * reach, ends.max() + 0.2 * reach, _CURVE)
    points = np.concatenate([grid, ends])[:, None]
    values = _evaluate(loss, has_aux, [(0, ())], w, args, points)
    axes.plot(grid, values[:_CURVE], color=_BLUE, linewidth=2.5, label="loss")
    looks = zip(itertools.cycle(_COLOURS), itertools.cycle(_DASHES), strict=True)
    for h, there, (colour, dash) in zip(steps, values[_CURVE:], looks, strict=False):
        secant = (there - height) / h
        (line,) = axes.plot(grid, _line(grid, here, height, secant), color=colour)
        line.set(linestyle=dash, label=f"h = {number(h)}: slope {number(secant, 4)}")
        axes.plot([here + h], [there], "o", color=colour, markersize=5)
    tangent = _line(grid, here, height, slope)
    label = f"tangent: slope {number(slope, 4)}"
    axes.plot(grid, tangent, color=_VERMILLION, linewidth=1.8, label=label)
    axes.plot([here], [height], "D", color=_VERMILLION, zorder=3)
    axes.set(xlabel="w", ylabel="loss L(w)")
    what = "Tangent and secants" if steps else "Tangent"
    axes.set_title(f"{what} at w = {number(here)}", fontsize="medium")
    axes.legend(loc="best", fontsize="small")
    return axes.figure.figure


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
    r"""Draws the loss over one or two parameters, and how descent went over it.

    At each point of the path an arrow shows $-c \, \partial L / \partial p$ there, with
    one $c$ for the whole picture; over one parameter the arrow lies on the tangent.

    The curve or the contours are a slice: the parameters that aren't drawn are held at
    the path's last point. Points and arrows are those of the path itself, so that with
    more parameters than are drawn, earlier points may lie off the curve.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree. Descent starts here; with `path` it gives only the structure.
      *args: the rest of the loss's arguments.
      entries: the one or two parameters to draw over, by name: `layers[0].weight[3][2]`
        (or `[3, 2]`); a leaf that is a single number has no index, and `params[1]` is
        an entry of an array alone. `None` takes all, where there are only one or two.
      path: the parameters at each point, as a loop over `sgd_update` goes through them.
      learning_rate: instead of `path`, of a descent by `sgd_update` from `params`.
      steps: how many updates that descent makes. It ends early where the loss or its
        gradient isn't finite.
      has_aux: the loss returns `(loss, aux)`.
      axes: where to draw; `None` makes a new figure of 6 by 4 inches.

    Returns:
      The matplotlib `Figure`, which a notebook shows, and `savefig` saves. Where the
      loss isn't finite the curve has a gap and contours are grey; points of the path
      without a finite loss, and arrows without a finite gradient, are named in the
      title, not drawn.

    Raises:
      ImportError: matplotlib isn't installed.
      TypeError: neither or both of `path` and `learning_rate`; `axes` isn't a
        matplotlib `Axes`; and as `value_and_grad`.
      ValueError: an entry that doesn't exist, or not one or two; a path that is empty,
        has trees of another structure, or has no point where the loss is finite;
        `steps` below 0.

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
    if (path is None) == (learning_rate is None):
        raise TypeError(
            "plot_descent needs a path or a learning_rate, one of the two, and was "
            f"given {'neither' if path is None else 'both'}."
        )
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, and is {steps}.")
    params = as_params(params)
    trained = partition(params)[0]
    chosen = _choose(trained, entries)
    places = list(chosen.values())
    if path is not None:
        path = [as_params(point) for point in path]
        _check_path(params, path)
    axes = _axes(axes)
    rows, last, trouble = _walk(
        loss, params, args, places, path, learning_rate, steps, has_aux
    )
    points, slopes, losses = np.split(rows, [len(chosen), -1], axis=1)
    low, high = points.min(0), points.max(0)
    size = np.maximum(np.abs(low), np.abs(high))
    half = np.where(high > low, 0.75 * (high - low), 0.5 * np.where(size > 0, size, 1))
    half = np.maximum(half, 1e-4 * size)  # float32 has no finer curve
    count = _CURVE if len(chosen) == 1 else _SIDE
    sides = np.linspace((low + high) / 2 - half, (low + high) / 2 + half, count).T
    grid = np.stack(np.meshgrid(*sides), axis=-1)
    flat = grid.reshape(-1, len(chosen))
    values = _evaluate(loss, has_aux, places, last, args, flat)
    values = values.reshape(grid.shape[:-1])
    count = len(points)
    title = [f"Gradient descent, {count} point{'s' if count > 1 else ''}", *trouble]
    if sum(map(np.size, jax.tree.leaves(trained))) > len(chosen):
        title.append("other parameters held at the last point")
    xlabel, ylabel = [*_labels(chosen), "loss"][:2]
    if len(chosen) == 1:
        axes.plot(sides[0], values, color=_BLUE, linewidth=2, label="loss")
        spread = np.ptp([*losses[:, 0], *values[np.isfinite(values)]])
        points, tips = np.hstack([points, losses]), np.hstack([slopes, slopes**2])
        _draw_path(axes, points, -tips, np.append(2 * half, spread), "gray")
    else:
        _contours(axes, sides, values)
        _draw_path(axes, points, -slopes, 2 * half, "white")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title("\n".join(title), fontsize="medium")
    axes.legend(loc="best", fontsize="small")
    return axes.figure.figure


def plot_gradient_flow(gradient: PyTree, axes: Axes | None = None) -> Figure:
    r"""Draws the norm of the gradient in each layer, on a logarithmic scale.

    Each leaf is a marker at its norm $\sqrt{\sum_i g_i^2}$, in a row of its own where
    there is room; else in the row of its layer, `layers[0]` for `layers[0].weight` and
    `layers[0].bias`; else in that of its first index, `blocks[0]` for all in it.
    A norm that a logarithmic scale doesn't have is a hollow marker in a band of its
    own, named zero, inf or NaN.

    Args:
      gradient: the tree that `jaxgrad.grad` returns, or an object that isn't a tree and
        has one as its attribute `gradient`.
      axes: where to draw; `None` makes a new figure of 6 by 4 inches.

    Returns:
      The matplotlib `Figure`, which a notebook shows, and `savefig` saves.

    Raises:
      ImportError: matplotlib isn't installed.
      TypeError: a leaf isn't an array of floats; or `axes` isn't a matplotlib `Axes`.
      ValueError: there are no leaves.

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
    axes = _axes(axes)
    inches = axes.get_window_extent().height / axes.figure.figure.dpi
    room = max(int(inches / 0.19), 1)
    for layer_of in (lambda path: path, lambda path: path[:-1] or path, _to_index):
        layers = [leaf_name(layer_of(path)) for path, _ in named]
        if len(set(layers)) <= room:
            break
    rows = {layer: row for row, layer in enumerate(dict.fromkeys(layers))}
    y = np.array([rows[layer] for layer in layers])
    # Where a row is one leaf its name says all; else its last key is in the legend.
    parts = [
        "" if leaf_name(path) == layer else leaf_name(path[-1:])
        for (path, _), layer in zip(named, layers, strict=True)
    ]
    norms = np.array([_norm(leaf) for _, leaf in named])
    x, on = _log_scale(axes, norms), np.isfinite(norms) & (norms > 0)
    colours, markers = itertools.cycle([_BLUE, *_COLOURS]), itertools.cycle("osD^vP")
    kinds = list(dict.fromkeys(parts))
    looks = zip(kinds, _labels(kinds), colours, markers, strict=False)
    for kind, label, colour, marker in looks:
        mine = np.array([part == kind for part in parts])
        for fill, shown in (("full", mine & on), ("none", mine & ~on)):
            (dots,) = axes.plot(x[shown], y[shown], marker, color=colour)
            dots.set(fillstyle=fill, markersize=6 if len(rows) <= room else 4)
            dots.set_label(label if kind and fill == "full" else "_")
    axes.set(xlabel="2-norm of the gradient", ylim=(len(rows) - 0.5, -0.5))
    axes.set_title("Gradient flow", fontsize="medium")
    every = -(-len(rows) // room)
    axes.set_yticks(range(0, len(rows), every), _labels(rows)[::every])
    axes.tick_params(axis="y", labelsize="small")
    if any(kinds):  # below the last row, where it hides no marker
        columns = 3 if max(map(len, kinds)) <= 12 else 1
        share = min(0.17 * (1 - -len(kinds) // columns) / inches, 0.5)
        axes.set_ylim(len(rows) / (1 - share) - 0.5, -0.5)
        axes.legend(loc="lower center", fontsize="small", ncols=columns)
    return axes.figure.figure


def _axes(axes: Axes | None) -> Axes:
    """The axes, checked; or those of a new figure, which pyplot doesn't know of."""
    try:
        import matplotlib.axes
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "Pictures are drawn with matplotlib, which isn't installed: "
            "pip install 'jaxgrad[plot]'"
        ) from error
    if axes is None:
        figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
        # By itself a notebook shows figures only once pyplot was imported.
        figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
        return figure.subplots()
    if not isinstance(axes, matplotlib.axes.Axes):
        raise TypeError(
            f"axes must be one matplotlib Axes, and is a {type(axes).__name__}."
        )
    return axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _labels(names: Iterable[str]) -> list[str]:
    """Names as matplotlib should write them: short, still different, no formulas."""
    names = list(names)
    for head in (17, 26, 8, 34, 0):
        short = [
            name if len(name) <= 36 else f"{name[:head]}…{name[head - 35 :]}"
            for name in names
        ]
        if len(set(short)) == len(set(names)):
            break
    else:
        short = [f"{place}: {name}" for place, name in enumerate(short)]
    return [name.replace("$", r"\$") for name in short]


def _line(x: np.ndarray, at: float, height: float, slope: float) -> np.ndarray:
    """A straight line through a point, for matplotlib: NaN isn't drawn."""
    with np.errstate(all="ignore"):
        y = height + slope * (x - at)
    return np.where(np.abs(y) < _LARGEST, y, np.nan)


def _indexed(name: str, index: Iterable[int]) -> str:
    return name + "".join(f"[{k}]" for k in index)


def _listed(tree: PyTree) -> str:
    """The entries of a tree: `w[0][0]` to `w[2][3]`, `b`."""
    texts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = leaf_name(path), np.shape(leaf)
        texts.append(f"`{_indexed(name, [0] * len(shape))}`")
        if np.size(leaf) > 1:
            texts[-1] += f" to `{_indexed(name, [n - 1 for n in shape])}`"
    return ", ".join(texts)


def _choose(trained: PyTree, names: str | Iterable[str] | None) -> dict[str, _Entry]:
    """The entries to draw over, by name."""
    named = jax.tree_util.tree_leaves_with_path(trained)
    leaves = [(leaf_name(path), np.shape(leaf)) for path, leaf in named]
    if names is None:
        names = [
            _indexed(name, index)
            for name, shape in leaves
            for index in itertools.islice(np.ndindex(*shape), 3)
        ]
    chosen: dict[str, _Entry] = {}
    for name in [names] if isinstance(names, str) else names:
        for place, (leaf, shape) in enumerate(leaves):
            index = tuple(map(int, re.findall(r"\d+", name[len(leaf) :])))
            inside = len(index) == len(shape) and all(map(operator.lt, index, shape))
            if inside and name.replace(", ", "][") == _indexed(leaf, index):
                chosen[name] = (place, index)
        if name not in chosen:
            raise ValueError(
                f"params has no entry `{name}`. There are {_listed(trained)}."
            )
    if len(set(chosen.values())) != len(chosen) or len(chosen) not in (1, 2):
        raise ValueError(
            "A picture is over one or two parameters: name them as entries=[...]. "
            f"There are {_listed(trained)}."
        )
    return chosen


def _check_path(params: PyTree, path: Sequence[PyTree]) -> None:
    if not path:
        raise ValueError("path is empty: it needs the parameters at one point or more.")
    want = jax.tree.structure(params), list(map(np.shape, jax.tree.leaves(params)))
    for place, point in enumerate(path):
        leaves, structure = jax.tree.flatten(point)
        if (structure, list(map(np.shape, leaves))) != want:
            raise ValueError(
                f"path[{place}] isn't a tree like params: it has {_listed(point)}; "
                f"params has {_listed(params)}."
            )


def _walk(
    loss: Loss,
    params: PyTree,
    args: tuple[Any, ...],
    entries: Sequence[_Entry],
    path: Sequence[PyTree] | None,
    learning_rate: Any,
    steps: int,
    has_aux: bool,
) -> tuple[np.ndarray, PyTree, list[str]]:
    """The path, or a descent made here: entries, their gradients and the loss in rows.

    Also the last point that can be drawn, and a note on those that aren't finite.
    """
    point, last, state = params, None, init_sgd(params)
    rows, bad = [], []
    for step in range(steps + 1) if path is None else range(len(path)):
        point = point if path is None else path[step]
        value, gradient = value_and_grad(loss, has_aux)(point, *args)
        trees = jax.tree.leaves(partition(point)[0]), jax.tree.leaves(gradient)
        found = [leaves[place][index] for leaves in trees for place, index in entries]
        row = np.array([*found, value[0] if has_aux else value], np.float64)
        fine = np.abs(row) < _LARGEST
        if fine[: len(entries)].all() and fine[-1]:
            rows.append(np.where(fine, row, np.nan))
            last = point
        if not fine.all():
            bad.append(step)
        if path is None:
            if bad:
                break
            point, state = sgd_update(
                point, grads=gradient, state=state, learning_rate=learning_rate
            )
    if not rows:
        raise ValueError("The loss isn't finite at any point of the path.")
    note = "loss or gradient not finite at point " + ", ".join(map(str, bad[:3]))
    note += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return np.array(rows), last, [note] if bad else []


def _evaluate(
    loss: Loss,
    has_aux: bool,
    entries: Sequence[_Entry],
    params: PyTree,
    args: tuple[Any, ...],
    points: np.ndarray,
) -> np.ndarray:
    """The loss with the entries at each of the points, in one compiled loop."""

    def build(get_loss: Callable[[], Loss]) -> Callable[..., Any]:
        def values(operands: tuple[Any, ...]) -> Any:
            held, trained, args, points = operands

            def at(point: Any) -> Any:
                leaves, treedef = jax.tree.flatten(trained)
                for (place, index), value in zip(entries, point, strict=True):
                    leaf = jnp.asarray(leaves[place])
                    leaves[place] = leaf.at[index].set(value.astype(leaf.dtype))
                moved = combine(jax.tree.unflatten(treedef, leaves), held)
                inner = jax.tree.map(lambda leaf: leaf, args)  # for Flax NNX
                return loss_and_aux(get_loss(), get_loss()(moved, *inner), has_aux)[0]

            return jax.lax.map(at, points)

        return jit_general(values)

    compiled = once_per_loss(loss, ("pictures", has_aux, tuple(entries)), build)
    trained, held = partition(params)
    with np.errstate(over="ignore"):  # of points past the dtype's largest number
        values = compiled(*split_static((held, trained, args, points)))
    values = np.asarray(values).astype(np.float64)
    return np.where(np.abs(values) < _LARGEST, values, np.nan)


def _contours(axes: Axes, sides: np.ndarray, values: np.ndarray) -> None:
    """Filled contours, each colour on an equal share of the picture."""
    from matplotlib.colors import BoundaryNorm

    axes.set(xlim=sides[0][[0, -1]], ylim=sides[1][[0, -1]], facecolor="0.8")
    finite = values[np.isfinite(values)]
    if finite.size:
        levels = np.unique(np.quantile(finite, np.linspace(0, 1, 13)))
        if len(levels) == 1:
            levels = levels + max(abs(levels[0]), 1) * np.array([-0.5, 0.5])
        filled = axes.contourf(
            *sides,
            np.ma.masked_invalid(values),
            levels=levels,
            norm=BoundaryNorm(levels, 256),
            cmap="cividis",
        )
        bar = axes.figure.colorbar(filled, ax=axes, label="loss", ticks=levels)
        bar.ax.set_yticklabels([number(level, 3) for level in levels])


def _draw_path(
    axes: Axes, points: np.ndarray, tips: np.ndarray, spans: np.ndarray, colour: str
) -> None:
    """The points, joined, with arrows of one scale, the longest 15 % of a side."""
    with np.errstate(all="ignore"):
        factor = np.fmin.reduce((0.15 * spans / np.abs(tips)).ravel(), initial=np.inf)
    arrows = tips * (factor if np.isfinite(factor) else 0)
    fine = np.isfinite(arrows).all(1)
    size = 3 if len(points) > 40 else 6
    axes.plot(*points.T, color=colour, linewidth=1)
    axes.plot(*points.T, "o", color="white", mec="black", markersize=size, label="path")
    axes.plot(*points[0], "D", color="white", mec="black", label="start")
    scaling: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
    quiver = axes.quiver(*points[fine].T, *arrows[fine].T, **scaling)
    quiver.set(color=_VERMILLION, zorder=3)
    (key,) = axes.plot([], [], " ", marker=r"$\rightarrow$", label="−gradient")
    key.set(markersize=12, color=_VERMILLION)
    if axes.get_xscale() == "linear":  # long numbers run into each other
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    axes.update_datalim((points + arrows)[fine])
    axes.autoscale_view()


def _norm(leaf: Any) -> float:
    """The 2-norm, in float64, without overflow on the way."""
    sizes = np.abs(np.asarray(leaf).astype(np.float64))
    largest = float(sizes.max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.sum((sizes / largest) ** 2)))


def _to_index(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The layer's part of a path: to the first key that ends in a number."""
    for place, key in enumerate(path[:-1]):
        if re.search(r"\d\W*$", leaf_name((key,))):
            return path[: place + 1]
    return path[:-1] or path


def _log_scale(axes: Axes, norms: np.ndarray) -> np.ndarray:
    """Sets the scale; says where each norm goes, those that it doesn't have too."""
    on = np.isfinite(norms) & (norms > 0)
    powers = np.log10(norms[on]) if on.any() else np.zeros(1)
    low, high = math.floor(powers.min()), math.ceil(powers.max())
    stride, gap = max(-(-(high - low) // 4), 1), max(high - low, 1) / 5
    ticks: dict[float, str] = {
        k: f"$10^{{{k}}}$" for k in range(low, high + 1, stride) if on.any()
    }
    left, right, place = low - gap / 4, high + gap / 4, norms.copy()
    for name, off in (
        ("zero", norms == 0),
        ("inf", np.isinf(norms)),
        ("NaN", np.isnan(norms)),
    ):
        if off.any():
            start = left - gap if name == "zero" else right
            left, right = min(left, start), max(right, start + gap)
            place[off] = 10.0 ** (start + gap / 2)
            ticks[start + gap / 2] = name
            edges = 10.0**start, 10.0 ** (start + gap)
            axes.axvspan(*edges, color="gray", alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlim(10.0**left, 10.0**right)
    axes.set_xticks([10.0**k for k in ticks], list(ticks.values()))
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.4)
    return place
