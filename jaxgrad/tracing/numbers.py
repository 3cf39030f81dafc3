"""A value or a cotangent in few characters."""

from __future__ import annotations

import numpy as np

from jaxgrad.flow import Summary
from jaxgrad.tables import number

Shown = np.ndarray | Summary | None


def is_bad(value: Shown) -> bool:
    """Whether any entry is infinite or NaN."""
    if isinstance(value, Summary):
        return value.nonfinite > 0
    return value is not None and not np.isfinite(value.astype(complex)).all()


def norm_of(value: Shown) -> float:
    """The 2-norm; infinite if an entry isn't finite, and -1 of nothing."""
    if value is None:
        return -1.0
    if is_bad(value):
        return float("inf")
    if isinstance(value, Summary):
        return value.norm
    return float(np.linalg.norm(value.astype(complex)))


def brief(value: Shown) -> str:
    """A number, the norm of an array, or how many of its entries aren't finite."""
    if value is None:
        return "-"
    if isinstance(value, Summary):
        if value.nonfinite:
            return f"{value.nonfinite} NaN, inf"
        return f"‖{number(value.norm, 4)}‖"
    if value.ndim == 0:
        return number(value, 4) if np.isrealobj(value) else f"{value:.3g}"
    if is_bad(value):
        wide = value.astype(complex)
        return f"{int((~np.isfinite(wide)).sum())} NaN, inf"
    return f"‖{number(norm_of(value), 4)}‖"


def full(value: Shown) -> str:
    """The numbers if they are few, or what a summary says."""
    if value is None:
        return "-"
    if isinstance(value, Summary):
        text = (
            f"{number(value.min, 3)} to {number(value.max, 3)}, mean "
            f"{number(value.mean, 3)}, norm {number(value.norm, 3)}"
        )
        if value.zeros:
            text += f", {value.zeros} zero"
        if value.nonfinite:
            text += f", {value.nonfinite} NaN, inf"
        return text
    if value.dtype.kind not in "biufc":  # bfloat16 and its like aren't NumPy's
        value = value.astype(np.float64)
    return np.array2string(value, precision=4, separator=", ").replace("\n", "")
