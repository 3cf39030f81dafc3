"""The same model in PyTorch and in JAX, side by side."""

from jaxgrad.comparing.compare import compare_with_torch
from jaxgrad.comparing.report import TorchComparison

__all__ = ["TorchComparison", "compare_with_torch"]
