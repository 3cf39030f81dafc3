"""The chain rule of a loss, step by step."""

from jaxgrad.tracing.report import GradientTrace
from jaxgrad.tracing.steps import Output, Step
from jaxgrad.tracing.trace import trace_gradient

__all__ = ["GradientTrace", "Output", "Step", "trace_gradient"]
