"""What pictures share: axes to draw in, names that fit there, a loss at many points."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxgrad.pytrees import Loss, combine, merge_static, partition, split_static

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that look different to all eyes: Okabe and Ito, Color universal design (2008).
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")
LARGEST = 1e100  # what matplotlib can lay out


def drawable(axes: Axes | None, height: float = 4.0) -> Axes:
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
        figure = matplotlib.figure.Figure(figsize=(6, height), layout="constrained")
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


def labels(names: Iterable[str]) -> list[str]:
    """Names as matplotlib should write them: short, still different, no formulas."""
    names = list(names)
    short = [n if len(n) <= 36 else f"{n[:17]}…{n[-18:]}" for n in names]
    if len(set(short)) < len(names):
        short = [f"{place}: {name}" for place, name in enumerate(short)]
    return [name.replace("$", r"\$") for name in short]


def loss_at(
    loss: Loss, has_aux: bool, operands: tuple[Any, ...], entries: Any, points: Any
) -> np.ndarray:
    """The loss of `(params, *args)` at points of params; NaN where it can't be drawn.

    Each entry is a trained leaf's place and an index in it; each point, their values.
    """
    arrays, static = split_static(operands)

    @jax.jit
    def values(arrays: list[Any], points: Any) -> Any:
        def at(point: Any) -> Any:
            params, *args = merge_static(arrays, static)
            trained, held = partition(params)
            leaves, treedef = jax.tree.flatten(trained)
            for (place, index), value in zip(entries, point, strict=True):
                leaf = leaves[place]
                leaves[place] = leaf.at[index].set(value.astype(leaf.dtype))
            moved = combine(jax.tree.unflatten(treedef, leaves), held)
            value = loss(moved, *args)
            return value[0] if has_aux else value

        return jax.lax.map(at, points)

    with np.errstate(over="ignore"):  # of points past the dtype's largest number
        found = np.asarray(values(arrays, points)).astype(np.float64)
    return np.where(np.abs(found) < LARGEST, found, np.nan)
