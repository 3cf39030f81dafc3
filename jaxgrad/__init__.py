"""Compute gradients with JAX, and see, check and compare them."""

from jaxgrad.checking import (
    EntryCheck,
    GradientCheck,
    LeafCheck,
    RuleCheck,
    assert_gradient,
    check_gradient,
)
from jaxgrad.comparing import (
    FirstDifference,
    LoadedParameter,
    LoadedParameters,
    ModuleOutput,
    ParameterComparison,
    TorchComparison,
    Trajectory,
    compare_with_torch,
    load_torch_parameters,
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
from jaxgrad.training import BatchError, TrainResult, TrainState, train

__all__ = [
    "BatchError",
    "Block",
    "DeadEntries",
    "DifferenceTable",
    "EntryCheck",
    "EntryStep",
    "Finding",
    "FirstDifference",
    "GradientCheck",
    "GradientTrace",
    "LeafCheck",
    "LeafStep",
    "LinearParams",
    "LoadedParameter",
    "LoadedParameters",
    "ModuleOutput",
    "Origin",
    "Output",
    "ParameterComparison",
    "RuleCheck",
    "SGDState",
    "Step",
    "StepExplanation",
    "Summary",
    "TorchComparison",
    "TrainResult",
    "TrainState",
    "Trajectory",
    "assert_gradient",
    "check_gradient",
    "compare_with_torch",
    "difference_table",
    "explain_step",
    "grad",
    "init_linear",
    "init_sgd",
    "linear",
    "linear_loss",
    "load_torch_parameters",
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
