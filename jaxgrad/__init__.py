"""Compute gradients with JAX, and see, check and compare them."""

from jaxgrad.checking import (
    EntryCheck,
    GradientCheck,
    LeafCheck,
    RuleCheck,
    assert_gradient,
    check_gradient,
)
from jaxgrad.differences import DifferenceTable, difference_table
from jaxgrad.explaining import EntryStep, LeafStep, StepExplanation, explain_step
from jaxgrad.flow import Block, DeadEntries, Origin, Summary
from jaxgrad.gradients import grad, value_and_grad
from jaxgrad.losses import linear_loss, mean_squared_error, squared_error
from jaxgrad.model import LinearParams, init_linear, linear
from jaxgrad.pictures import plot_descent, plot_gradient_flow, plot_tangent
from jaxgrad.sgd import SGDState, init_sgd, sgd_update
from jaxgrad.tables import Finding
from jaxgrad.tracing import GradientTrace, Output, Step, trace_gradient
from jaxgrad.training import TrainResult, TrainState, train

__all__ = [
    "Block",
    "DeadEntries",
    "DifferenceTable",
    "EntryCheck",
    "EntryStep",
    "Finding",
    "GradientCheck",
    "GradientTrace",
    "LeafCheck",
    "LeafStep",
    "LinearParams",
    "Origin",
    "Output",
    "RuleCheck",
    "SGDState",
    "Step",
    "StepExplanation",
    "Summary",
    "TrainResult",
    "TrainState",
    "assert_gradient",
    "check_gradient",
    "difference_table",
    "explain_step",
    "grad",
    "init_linear",
    "init_sgd",
    "linear",
    "linear_loss",
    "mean_squared_error",
    "plot_descent",
    "plot_gradient_flow",
    "plot_tangent",
    "sgd_update",
    "squared_error",
    "trace_gradient",
    "train",
    "value_and_grad",
]
