"""Faults: losses whose gradient is non-finite or zero, and healthy ones beside them.

`NONFINITE`, `ZEROS` and `HEALTHY` hold the cases; `marks` gives the lines to blame.
"""

from faults import (
    healthy,
    healthy_libraries,
    nonfinite_arithmetic,
    nonfinite_control,
    nonfinite_data,
    nonfinite_equinox,
    nonfinite_flax_optax,
    nonfinite_matrices,
    nonfinite_models,
    nonfinite_overflow,
    zeros,
    zeros_factors,
    zeros_libraries,
)
from faults.case import (
    KINDS,
    REASONS,
    Case,
    Gradient,
    Healthy,
    Marks,
    Nonfinite,
    Problem,
    Zero,
    file_of,
    gradient,
    in_libraries,
    marks,
)

NONFINITE: tuple[Nonfinite, ...] = (
    *nonfinite_arithmetic.CASES,
    *nonfinite_overflow.CASES,
    *nonfinite_control.CASES,
    *nonfinite_data.CASES,
    *nonfinite_matrices.CASES,
    *nonfinite_equinox.CASES,
    *nonfinite_flax_optax.CASES,
    *nonfinite_models.CASES,
)
ZEROS: tuple[Zero, ...] = (
    *zeros.CASES,
    *zeros_factors.CASES,
    *zeros_libraries.CASES,
)
HEALTHY: tuple[Healthy, ...] = (*healthy.CASES, *healthy_libraries.CASES)

__all__ = [
    "HEALTHY",
    "KINDS",
    "NONFINITE",
    "REASONS",
    "ZEROS",
    "Case",
    "Gradient",
    "Healthy",
    "Marks",
    "Nonfinite",
    "Problem",
    "Zero",
    "file_of",
    "gradient",
    "in_libraries",
    "marks",
]
