"""In which layouts a PyTorch parameter fits a leaf's shape, and which is the custom.

PyTorch's own layouts are (out, in) for a linear layer, (out, in, *spatial) for a
convolution and (in, out, *spatial) for a transposed one, whose kernel JAX's libraries
keep mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.layouts import layout_text
from jaxgrad.comparing.loading.naming import last_name, parse

Array = npt.NDArray[Any]

_TRANSPOSED = {"transpose", "transposed", "deconv", "convt", "up", "upsample"}


@dataclass(frozen=True)
class Fit:
    """A layout that fits: the axes in another order, perhaps mirrored, and reshaped.

    Attributes:
      axes: PyTorch's axes, in the leaf's order.
      mirrored: whether the spatial axes (all but PyTorch's first two) are reversed.
      shape: the leaf's shape.
      regrouped: whether axes are split or merged, beyond axes of length 1.
      text: for a person.
    """

    axes: tuple[int, ...]
    mirrored: bool
    shape: tuple[int, ...]
    regrouped: bool
    text: str

    def __call__(self, array: Array) -> Array:
        """PyTorch's array, laid out as the leaf."""
        if self.mirrored:
            array = np.flip(array, tuple(range(2, array.ndim)))
        return array.transpose(self.axes).reshape(self.shape)


def fits_of(torch_shape: Sequence[int], shape: Sequence[int]) -> list[Fit]:
    """All layouts that fit and that differ, PyTorch's own first."""
    torch_shape, shape = tuple(torch_shape), tuple(shape)
    if math.prod(torch_shape) != math.prod(shape):
        return []
    fits, seen = [], set()
    orders = _orders(torch_shape)
    # An axis of length 1 that is where it should be tells the orders apart.
    exact = [o for o in orders if tuple(torch_shape[a] for a in o[0]) == shape]
    for axes, mirrored in exact or orders:
        mixed = tuple(torch_shape[axis] for axis in axes)
        if not _groups(mixed, shape) or (mirrored and mixed != shape):
            continue
        # Axes of length 1 may stand anywhere; the numbers come in the same order.
        long = tuple(axis for axis in axes if torch_shape[axis] > 1)
        mirrored = mirrored and any(axis > 1 for axis in long)
        if (long, mirrored) in seen:
            continue
        seen.add((long, mirrored))
        text = layout_text(torch_shape, axes, shape) + mirrored * ", mirrored"
        if text == "as it is" and torch_shape != shape:  # axes of length 1 moved
            text = f"reshaped to {shape}"
        regrouped = _long(mixed) != _long(shape)
        fits.append(Fit(axes, mirrored, shape, regrouped, text))
    return fits


def _orders(shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], bool]]:
    """The orders of axes in which a library could keep a parameter."""
    if len(shape) < 2:
        return [(tuple(range(len(shape))), False)]
    if len(shape) == 2:
        return [((0, 1), False), ((1, 0), False)]
    space = tuple(range(2, len(shape)))
    return [
        ((0, 1, *space), False),
        ((*space, 1, 0), False),
        ((0, *space, 1), False),
        ((1, *space, 0), False),
        ((1, 0, *space), False),
        ((1, 0, *space), True),
        ((*space, 0, 1), False),
        ((*space, 0, 1), True),
    ]


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n > 1)


def _groups(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether a reshape only splits axes or merges them, and doesn't mix any."""
    a, b = list(_long(left)), list(_long(right))
    if 0 in left or 0 in right:
        return sorted(left) == sorted(right)
    while a and b:
        x, y = [a.pop(0)], [b.pop(0)]
        while math.prod(x) != math.prod(y):
            shorter, rest = (x, a) if math.prod(x) < math.prod(y) else (y, b)
            if not rest:
                return False
            shorter.append(rest.pop(0))
        if min(len(x), len(y)) > 1:
            return False
    return not a and not b


@dataclass(frozen=True)
class Custom:
    """How a library keeps what it calls by some name.

    Attributes:
      axes: PyTorch's axes, in the leaf's order.
      mirrored: whether the spatial axes are reversed.
      said: for a person.
    """

    axes: tuple[int, ...]
    mirrored: bool
    said: str

    def pick(self, torch_shape: Sequence[int], fits: Sequence[Fit]) -> Fit | None:
        """The one of the layouts that the custom says, if it's among them."""
        long = [axis for axis in self.axes if torch_shape[axis] > 1]
        mirrored = self.mirrored and any(axis > 1 for axis in long)
        for fit in fits:
            same = [axis for axis in fit.axes if torch_shape[axis] > 1] == long
            if same and fit.mirrored == mirrored:
                return fit
        return None


def custom_of(
    path: str, owner: Any, torch_shape: Sequence[int], fits: Sequence[Fit]
) -> Custom | None:
    """What a library's custom says about a leaf, by its name and its owner."""
    name, kind = last_name(path), type(owner).__name__
    own, space = tuple(range(len(torch_shape))), tuple(range(2, len(torch_shape)))
    if len(own) < 2 or (space and any(fit.regrouped for fit in fits)):
        return None  # which axes of a convolution were merged, and how, no custom says
    if name == "kernel":
        if not space:
            return Custom((1, 0), False, "`kernel` is (in, out)")
        usual = Custom((*space, 1, 0), False, "`kernel` is (*spatial, in, out)")
        turned = _TRANSPOSED & set(parse(path).words)
        if usual.pick(torch_shape, fits) is not None:
            return None if turned else usual
        said = "`kernel` of a transposed convolution is (*spatial, in, out), mirrored"
        return Custom((*space, 0, 1), True, said)
    if name == "embedding":
        return Custom(own, False, "`embedding` is (number, features)")
    if _is_layer(owner) and name.startswith("weight"):
        if is_transposed_convolution(owner):
            said = f"{kind}'s `{name}` is (out, in, *spatial), mirrored"
            return Custom((1, 0, *space), True, said)
        said = f"{kind}'s `{name}` is laid out as PyTorch's, (out, in)"
        return Custom(own, False, said)
    return None


def is_transposed_convolution(owner: Any) -> bool:
    """Whether the owner is an Equinox layer whose kernel is PyTorch's, mirrored."""
    return _is_layer(owner) and "ConvTranspose" in type(owner).__name__


def _is_layer(owner: Any) -> bool:
    """Whether the owner is one of Equinox's layers, or our linear one."""
    return any(
        base.__module__.startswith("equinox.nn")
        or (base.__module__, base.__name__) == ("jaxgrad.model", "LinearParams")
        for base in type(owner).__mro__
    )
