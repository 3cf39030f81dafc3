"""Says whether a gradient is right, where it is wrong, and how."""

from jaxgrad.checking.check import assert_gradient, check_gradient
from jaxgrad.checking.report import (
    EntryCheck,
    GradientCheck,
    LeafCheck,
    RuleCheck,
)

__all__ = [
    "EntryCheck",
    "GradientCheck",
    "LeafCheck",
    "RuleCheck",
    "assert_gradient",
    "check_gradient",
]
