"""Finds PyTorch's tensors among JAX's values, by content, whatever their layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.jax_side import Made
from jaxgrad.comparing.layouts import layout_text

Array = npt.NDArray[Any]

# What is further apart than this isn't taken for the same thing computed otherwise.
NEAR = 0.5
# Layouts of more axes than this aren't tried.
_AXES = 5
# A projection that a network computes at once may be computed in so many parts.
_PARTS = (2, 3, 4)
# So many values are looked at for the closest one.
_NEAREST = 12
# Fewer numbers than this are a multiple of others by chance.
_SEVERAL = 4


class Found(NamedTuple):
    """Where among JAX's values a tensor was found.

    Attributes:
      value: which value; of a tensor found in parts, the first part's.
      error: the norm of the difference, over the tensor's norm.
      layout: how JAX lays it out.
    """

    value: int
    error: float
    layout: str


class Pool:
    """JAX's values, to look up by content.

    Attributes:
      made: the values.
    """

    def __init__(self, made: Sequence[Made]) -> None:
        self.made = made
        self._arrays: dict[int, Array] = {}
        self._sized: dict[int, list[int]] = {}
        for index, value in enumerate(made):
            self._sized.setdefault(int(value.array.size), []).append(index)
        self._sketches: dict[int, Array] = {}

    def array(self, index: int) -> Array:
        """One value, in float64."""
        if index not in self._arrays:
            self._arrays[index] = np.asarray(self.made[index].array).astype(np.float64)
        return self._arrays[index]

    def _sketched(self, size: int) -> tuple[list[int], Array]:
        indices = self._sized.get(size, [])
        if size not in self._sketches and indices:
            rows = [_sketch(self.array(index)) for index in indices]
            self._sketches[size] = np.array(rows)
        return indices, self._sketches.get(size, np.zeros((0, 4)))

    def find(self, tensor: Array, tolerance: float) -> Found | None:
        """The first value that has a tensor's numbers, in whatever layout."""
        found = self._whole(tensor, tolerance)
        if found is None and tensor.ndim > 1:
            for axis, parts in itertools.product((-1, 1), _PARTS):
                if tensor.shape[axis] % parts == 0:
                    chunks = np.split(tensor, parts, axis)
                    places = [self._whole(chunk, tolerance) for chunk in chunks]
                    if all(places):
                        known = [place for place in places if place is not None]
                        worst = max(place.error for place in known)
                        return Found(known[0].value, worst, f"in {parts} parts")
        return found

    def _whole(self, tensor: Array, tolerance: float) -> Found | None:
        indices, sketches = self._sketched(tensor.size)
        if not len(sketches):
            return None
        own = _sketch(tensor)
        size, rms = tensor.size, max(own[0], 1e-300)
        # A difference of norm e can change the root of the mean square by e / sqrt(n),
        # the mean by as much, and the largest and the least number by e.
        slack = 1.01 * tolerance * rms * np.array([1, 1, size**0.5, size**0.5])
        slack = slack + 1e-14 * rms
        with np.errstate(invalid="ignore"):
            fits = (np.abs(sketches - own) <= slack).all(axis=1)
        for place in np.flatnonzero(fits):
            index = indices[int(place)]
            error, layout = closest(tensor, self.array(index), tolerance)
            if error <= tolerance:
                return Found(index, error, layout)
        return None

    def near(self, tensor: Array) -> Found | None:
        """The value that is closest to a tensor, if any is close; no constant."""
        indices, sketches = self._sketched(tensor.size)
        if not len(sketches) or tensor.size == 1:
            return None
        own = _sketch(tensor)
        apart = np.abs(sketches - own).sum(axis=1)
        best = None
        order = np.argsort(apart, kind="stable")
        moving = [p for p in order.tolist() if self.made[indices[p]].moves]
        for place in moving[:_NEAREST]:
            index = indices[place]
            error, layout = closest(tensor, self.array(index), 0.0)
            if error < NEAR and (best is None or error < 0.99 * best.error):
                best = Found(index, error, layout)
        return best

    def scalars(self) -> list[float]:
        """The single numbers that don't depend on the parameters: constants, mostly."""
        found = [i for i in self._sized.get(1, []) if not self.made[i].moves]
        values = [float(self.array(i).reshape(())) for i in found]
        return [float(f"{x:.12g}") for x in values if np.isfinite(x)]

    def multiple(self, tensor: Array, tolerance: float) -> float | None:
        """The factor by which some value is a multiple of a tensor, if one is."""
        _, sketches = self._sketched(tensor.size)
        own = np.array(_sketch(tensor))
        if not (own[0] and np.isfinite(own[0])) or tensor.size < _SEVERAL:
            return None
        for row in sketches[np.isfinite(sketches[:, 0])]:
            for sign in (1, -1):
                factor = sign * row[0] / own[0]
                if factor == 0 or abs(factor - 1) <= tolerance:
                    continue
                if self._whole(tensor * factor, tolerance) is not None:
                    return float(factor)
        return None

    def dropped(self, tensor: Array) -> tuple[Array, float] | None:
        """Which entries of a tensor some value has, times a factor; others are 0."""
        if tensor.size < _SEVERAL:
            return None
        for index in self._sized.get(tensor.size, []):
            value = self.array(index)
            zeros = np.count_nonzero(value == 0)
            if not 0 < zeros < value.size:
                continue
            for own, other, inverse in _arranged_back(tensor, value):
                left = (other != 0) & (own != 0)
                gone = (other == 0) & (own != 0)
                if not left.any() or not gone.any() or (other[own == 0] != 0).any():
                    continue
                ratios = other[left] / own[left]
                if np.ptp(ratios) <= 1e-5 * abs(ratios[0]) and ratios[0] > 1:
                    return inverse(other != 0), float(ratios[0])
        return None


def _sketch(array: Array) -> tuple[float, float, float, float]:
    """What doesn't depend on the order: root mean square, mean, largest, least."""
    if not array.size:
        return 0.0, 0.0, 0.0, 0.0
    array = array.astype(np.float64, copy=False)
    flat = array.reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        rms = float(np.sqrt(np.dot(flat, flat) / flat.size))
        return rms, float(flat.mean()), float(flat.max()), float(flat.min())


def closest(tensor: Array, value: Array, enough: float) -> tuple[float, str]:
    """The error of a tensor against a value in the layout that brings them closest."""
    best = np.inf, "as it is"
    norm = float(np.linalg.norm(tensor.ravel())) or 1e-300
    for own, other, text in _arranged(tensor, value):
        error = float(np.linalg.norm((own - other).ravel())) / norm
        if error < best[0]:
            best = error, text
        if error <= enough:
            break
    return best


def _arranged_back(
    tensor: Array, value: Array
) -> Iterator[tuple[Array, Array, Callable[[Array], Array]]]:
    """The tensor, the value in its layout, and what brings others there too."""
    one, two = np.squeeze(tensor), np.squeeze(value)
    if one.ndim > _AXES or two.ndim > _AXES:
        return
    for axes in itertools.permutations(range(two.ndim)):
        shape = tuple(two.shape[axis] for axis in axes)
        if shape == one.shape:
            yield one, two.transpose(axes), lambda x: x.reshape(tensor.shape)


def _arranged(tensor: Array, value: Array) -> Iterator[tuple[Array, Array, str]]:
    """The two in layouts in which they could be the same."""
    one, two = np.squeeze(tensor), np.squeeze(value)
    if one.ndim > _AXES or two.ndim > _AXES:
        yield tensor.reshape(-1), value.reshape(-1), "as it is"
        return
    for axes in itertools.permutations(range(one.ndim)):
        text = layout_text(one.shape, axes, two.shape)
        yield one.transpose(axes).reshape(two.shape), two, text
    if one.shape != two.shape:
        for axes in itertools.permutations(range(two.ndim)):
            text = f"reshaped to {value.shape}"
            yield one, two.transpose(axes).reshape(one.shape), text
