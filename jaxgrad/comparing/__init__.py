"""The same model in PyTorch and in JAX, side by side."""

from jaxgrad.comparing.compare import compare_with_torch
from jaxgrad.comparing.loading import (
    LoadedParameter,
    LoadedParameters,
    load_torch_parameters,
)
from jaxgrad.comparing.report import (
    FirstDifference,
    ModuleOutput,
    ParameterComparison,
    TorchComparison,
)
from jaxgrad.comparing.trajectories import Trajectory

__all__ = [
    "FirstDifference",
    "LoadedParameter",
    "LoadedParameters",
    "ModuleOutput",
    "ParameterComparison",
    "TorchComparison",
    "Trajectory",
    "compare_with_torch",
    "load_torch_parameters",
]
