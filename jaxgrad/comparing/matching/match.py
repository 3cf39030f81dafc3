"""Finds which JAX leaf is made of which PyTorch parameters, and how, by content.

Informative contents come first: a sample of a leaf is compared with each parameter in
every order that the shapes allow; what isn't found so is looked up value by value.
Contents that say little (ones, zeros, equal layers) are then settled by names.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import Layout, Piece, piece_of, put_back, whole
from jaxgrad.comparing.matching.content import MOST, Differing, count, differing, share
from jaxgrad.comparing.matching.orders import describe
from jaxgrad.comparing.matching.record import Ambiguity
from jaxgrad.comparing.matching.searching import Search

Array = npt.NDArray[Any]
Transform = Callable[[Any], Any]

# Orders of more axes than this aren't tried.
_AXES = 5


class Matches(NamedTuple):
    """Which leaf is made of which parameters.

    Attributes:
      layouts: of each leaf that has one, in the leaves' order.
      unmatched_leaves: the paths of leaves without a partner.
      unmatched_names: the PyTorch parameters without a partner.
      ambiguous: what the contents left open, and how it was settled.
      differing: the leaves whose values aren't those of their parameters.
    """

    layouts: tuple[Layout, ...]
    unmatched_leaves: tuple[str, ...]
    unmatched_names: tuple[str, ...]
    ambiguous: tuple[Ambiguity, ...]
    differing: tuple[Differing, ...]


def match(
    leaves: Mapping[str, Array],
    parameters: Mapping[str, Array],
    mapping: Mapping[str, str | tuple[str, Transform]] | None = None,
) -> Matches:
    """Finds how each leaf is made of PyTorch's parameters.

    Args:
      leaves: the JAX leaves by path.
      parameters: PyTorch's parameters by name, each once.
      mapping: what is known: of a leaf's path, the parameter's name, or that and a
        function that turns PyTorch's array into JAX's.

    Raises:
      KeyError: `mapping` names a leaf or parameter that doesn't exist.
      ValueError: `mapping` pairs shapes that can't be, or nothing fits at all.
    """
    search = Search(leaves, parameters)
    given = _given(search, leaves, parameters, dict(mapping or {}))
    search.find([path for path in leaves if path not in dict(mapping or {})])
    found = {
        path: _once(search, layout) for path, layout in search.layouts().items()
    } | given
    layouts = [found[path] for path in leaves if path in found]
    if not layouts:
        raise ValueError(_nothing(leaves, parameters))
    matched = {layout.path for layout in layouts}
    used = {name for layout in layouts for p in layout.pieces for name in p.names}
    return Matches(
        tuple(layouts),
        tuple(path for path in leaves if path not in matched),
        tuple(name for name in parameters if name not in used),
        tuple(search.ambiguous),
        tuple(_differing(search, layouts)),
    )


def _once(search: Search, layout: Layout) -> Layout:
    """The layout, unless it has a whole parameter, but some of its numbers twice.

    No port repeats a row of a parameter in the place of another: those of the leaf that
    are repeated have a wrong value, as when a row was overwritten.
    """
    names = {name for piece in layout.pieces for name in piece.names}
    name, *others = names
    parameter = search.parameters[name]
    if others or parameter.size != count(layout.shape) or _takes_all(layout, name):
        return layout
    best = None
    for axes in itertools.permutations(range(min(parameter.ndim, _AXES))):
        order = whole(layout.path, layout.shape, name, parameter.shape, axes)
        if order is None or parameter.ndim > _AXES:
            continue
        equal = share(search.leaves[layout.path], order.pieces[0], search.parameters)
        if equal >= MOST and (best is None or equal > best[0]):
            best = equal, order
    if best is None:
        return layout
    search.equal.pop(layout.path, None)  # it was counted for the other
    return best[1]


def _takes_all(layout: Layout, name: str) -> bool:
    """Whether a layout has each place of a parameter."""
    if (
        sum(len(set(along.tolist())) for p in layout.pieces for along in p.offsets)
        == (sum(map(len, (along for p in layout.pieces for along in p.offsets))))
        and len(layout.pieces) == 1
    ):
        return True
    places = np.zeros(count(layout.shape), np.int8)
    hit = {name: places}
    for piece in layout.pieces:
        put_back(piece, np.ones(piece.shape, np.int8), hit)
    return bool((places == 1).all())


def _differing(search: Search, layouts: Sequence[Layout]) -> list[Differing]:
    found = []
    for layout in layouts:
        leaf = search.leaves[layout.path]
        if layout.transform is None and search.equal.get(layout.path) == leaf.size:
            continue
        one = differing(
            layout.path, leaf, layout.pieces, search.parameters, layout.transform
        )
        if one is not None:
            found.append(one)
    return found


def _nothing(leaves: Mapping[str, Array], parameters: Mapping[str, Array]) -> str:
    def some(arrays: Mapping[str, Array]) -> str:
        shown = [f"`{name}` {array.shape}" for name, array in arrays.items()][:4]
        more = len(arrays) - len(shown)
        return (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")

    return (
        "No JAX leaf fits a PyTorch parameter by its values, or by its shape and name."
        f" JAX's leaves: {some(leaves)}. PyTorch's parameters: {some(parameters)}."
        " Are these the same model? If so, say which is which: "
        'mapping={"leaf": "parameter"}, or {"leaf": ("parameter", transform)}.'
    )


def _given(
    search: Search,
    leaves: Mapping[str, Array],
    parameters: Mapping[str, Array],
    mapping: Mapping[str, str | tuple[str, Transform]],
) -> dict[str, Layout]:
    """The layouts that `mapping` gives."""
    found = {}
    for path, value in mapping.items():
        name, transform = (value, None) if isinstance(value, str) else value
        _check(path, leaves, "JAX leaf")
        _check(name, parameters, "PyTorch parameter")
        if transform is not None:
            found[path] = _transformed(
                path, leaves[path], name, parameters[name], transform
            )
            search.take(found[path])
            continue
        if not search.find_in(path, name):
            raise ValueError(
                f"`mapping` pairs the JAX leaf `{path}` of shape "
                f"{leaves[path].shape} with the PyTorch parameter `{name}` of shape "
                f"{parameters[name].shape}: they don't fit. Give a transform from "
                f"PyTorch's array to JAX's: "
                f'mapping={{"{path}": ("{name}", transform)}}.'
            )
    return found


def _check(name: str, arrays: Mapping[str, Array], what: str) -> None:
    if name in arrays:
        return
    near = difflib.get_close_matches(name, arrays, n=3, cutoff=0.3) or list(arrays)[:3]
    names = " or ".join(f"`{n}`" for n in near)
    raise KeyError(
        f"`mapping` names the {what} `{name}`, which doesn't exist. "
        + (f"Did you mean {names}?" if near else "There are none.")
    )


def _transformed(
    path: str, leaf: Array, name: str, torch: Array, transform: Transform
) -> Layout:
    """A layout of the user's own function."""
    result = np.asarray(transform(torch.copy()))
    if result.shape != leaf.shape:
        raise ValueError(
            f"The transform of `{path}` turns the PyTorch parameter `{name}` of shape "
            f"{torch.shape} into shape {result.shape}, but the JAX leaf has shape "
            f"{leaf.shape}."
        )
    piece = _rearrangement(name, torch.shape, transform)
    if piece is not None:
        text = describe([piece], leaf.shape, {name: torch.shape})
        return Layout(path, leaf.shape, (piece,), text)
    offsets = tuple(np.zeros(length, np.int64) for length in leaf.shape)
    piece = Piece((name,), (0,) * leaf.ndim, offsets)
    return Layout(path, leaf.shape, (piece,), "by the transform given", transform)


def _rearrangement(
    name: str, shape: tuple[int, ...], transform: Transform
) -> Piece | None:
    """The transform as a piece, if it only moves numbers."""
    size = count(shape)
    try:
        places = np.asarray(transform(np.arange(size).reshape(shape)))
        # Another array with other numbers tells if it also computes with them.
        other = np.random.default_rng(0).permutation(size)
        moved = np.asarray(transform(other.reshape(shape)))
    except Exception:  # it's the user's, and may want floats
        return None
    whole = np.issubdtype(places.dtype, np.integer) and places.size > 0
    if not whole or places.min() < 0 or places.max() >= size:
        return None
    return piece_of(name, places) if np.array_equal(other[places], moved) else None
