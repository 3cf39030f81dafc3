"""Compute gradients with JAX, and see, check and compare them."""

from jaxgrad.checking import (
    EntryCheck,
    Finding,
    GradientCheck,
    LeafCheck,
    RuleCheck,
    assert_gradient,
    check_gradient,
)
from jaxgrad.differences import DifferenceTable, difference_table
from jaxgrad.gradients import grad, value_and_grad
from jaxgrad.losses import linear_loss, mean_squared_error, squared_error
from jaxgrad.model import LinearParams, init_linear, linear
from jaxgrad.sgd import SGDState, init_sgd, sgd_update
from jaxgrad.tracing import GradientTrace, trace_gradient
from jaxgrad.training import TrainResult, TrainState, train

__all__ = [
    "DifferenceTable",
    "EntryCheck",
    "Finding",
    "GradientCheck",
    "GradientTrace",
    "LeafCheck",
    "LinearParams",
    "RuleCheck",
    "SGDState",
    "TrainResult",
    "TrainState",
    "assert_gradient",
    "check_gradient",
    "difference_table",
    "grad",
    "init_linear",
    "init_sgd",
    "linear",
    "linear_loss",
    "mean_squared_error",
    "sgd_update",
    "squared_error",
    "trace_gradient",
    "train",
    "value_and_grad",
]
