"""A large array in seven numbers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.compiling import Program, shaped


@dataclass(frozen=True)
class Summary:
    """What an array holds; of complex numbers, what their magnitudes are.

    Attributes:
      size: how many entries it has.
      min: the least of its finite entries; `nan` if there is none.
      mean: the mean of those.
      max: the greatest of those.
      norm: their 2-norm.
      zeros: how many entries are zero.
      nonfinite: how many are infinite or NaN.
      nan: how many are NaN.
    """

    size: int
    min: float
    mean: float
    max: float
    norm: float
    zeros: int
    nonfinite: int
    nan: int


def _numbers(array: Any) -> tuple[Any, ...]:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.abs(array)
    finite = jnp.isfinite(array)
    # float16 and bfloat16 would overflow, or lose count.
    small = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    wide = array.astype(jnp.float32) if small else array * 1.0
    clean = jnp.where(finite, wide, 0)
    count = jnp.sum(finite)
    # Scaled, so that squares don't overflow.
    scale = jnp.maximum(jnp.max(jnp.abs(clean), initial=0), 1e-30)
    floats = (
        jnp.min(jnp.where(finite, wide, jnp.inf), initial=jnp.inf),
        jnp.sum(clean) / count,
        jnp.max(jnp.where(finite, wide, -jnp.inf), initial=-jnp.inf),
        scale * jnp.sqrt(jnp.sum((clean / scale) ** 2)),
    )
    counts = jnp.sum(array == 0), array.size - count, jnp.sum(jnp.isnan(array))
    return jnp.stack(floats), jnp.stack(counts)


@functools.cache
def _program(aval: Any, sharding: Any) -> Program:
    like = shaped(aval.shape, aval.dtype, sharding)
    return Program(_numbers, int(np.prod(aval.shape)), like)


def summary_of(array: Any) -> Summary:
    """The numbers of an array, by one small program per shape and dtype."""
    array = jnp.asarray(array)
    program = _program(jax.typeof(array), array.sharding)
    floats, counts = map(np.asarray, program(array))
    least, mean, most, norm = floats.tolist()
    zeros, nonfinite, nan = counts.tolist()
    if nonfinite == array.size:
        least = mean = most = math.nan
    size = int(array.size)
    return Summary(size, least, mean, most, norm, zeros, nonfinite, nan)


@functools.cache
def is_number(dtype: Any) -> bool:
    """Whether a dtype is one of numbers or booleans, and not of keys."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended)
