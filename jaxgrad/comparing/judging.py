"""How far apart two gradients may be: rounding, and what is more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxgrad.comparing.jax_side import JaxSide
from jaxgrad.comparing.links import Link, Measure
from jaxgrad.comparing.sides import Both

# float32 gradients of one loss, summed in another order, differ by about so much of
# their norm; where they differ by more, float64 tells rounding from a mistake.
NATIVE = 1e-6
# Two losses in float32: a sum of many terms, each of which is rounded.
NATIVE_LOSS = 1e-5
# In float64 two computations of one gradient agree to about 1e-13. What differs by less
# than the first is rounding; by more than the second it's another gradient. Between
# the two it may be constants that one side has in float32 (6e-8 each): it's called a
# difference only if a mistake explains it.
SAME, OTHER = 1e-9, 1e-6
# What is so small beside the whole gradient is the rounding of terms that cancel, as in
# the bias of a key, whose true gradient is 0.
_CANCELLED, _CANCELLED_NATIVELY = 1e-12, 1e-6
# Without float64: so many times what one rounding of each parameter does.
_ROUNDINGS = 32


class Judge:
    """Says of a measure if it's more than rounding explains.

    Attributes:
      loss_bound: the relative difference of the losses that isn't allowed.
    """

    def __init__(self, side: JaxSide, both: Both, rtol: float | None) -> None:
        self._scale, self._wide = both.scale, both.wide
        self._bounds: Mapping[str, float] = {}
        self._bound = rtol or OTHER
        self._floor = _CANCELLED if both.wide else _CANCELLED_NATIVELY
        if not both.wide and rtol is None:
            self._bounds = _noise(side)
        self.loss_bound = max(self._bound, 0 if both.wide else NATIVE_LOSS)

    def wrong(self, link: Link, m: Measure) -> bool:
        """Whether the two gradients differ."""
        if not m.finite:
            return True
        paths = link.path.split(" + ")
        bound = max([self._bound, *(self._bounds.get(path, 0.0) for path in paths)])
        return m.off > bound * m.theirs + self._floor * self._scale

    def grey(self, m: Measure) -> bool:
        """Whether they differ by more than float64's rounding; it may be constants'."""
        return self._wide and m.off > SAME * m.theirs + self._floor * self._scale

    def counts(self, m: Measure) -> bool:
        """Whether a gradient is more than what is left of terms that cancel."""
        return max(m.ours, m.theirs) > self._floor * self._scale


def _noise(side: JaxSide) -> dict[str, float]:
    """Per leaf, what a rounding of each parameter does to the gradient, of its norm."""
    here = side.native().gradients
    rng = np.random.default_rng(0)
    worst = dict.fromkeys(here, 0.0)
    for _ in range(2):
        leaves = []
        for leaf in side.leaves.values():
            array = np.asarray(leaf).astype(np.float64)
            eps = float(np.finfo(np.float32).eps)
            if leaf.dtype.itemsize < 4:
                eps = 2.0**-8  # bfloat16's, and more than float16's
            moved = array * (1 + eps * rng.uniform(-1, 1, array.shape))
            leaves.append(moved.astype(np.asarray(leaf).dtype))
        there = side.native(leaves).gradients
        for name, gradient in here.items():
            own = gradient.astype(np.float64)
            off = np.linalg.norm(there[name].astype(np.float64) - own)
            share = float(off / (np.linalg.norm(own) or 1.0))
            worst[name] = max(worst[name], share)
    return {n: max(NATIVE_LOSS, _ROUNDINGS * share) for n, share in worst.items()}
