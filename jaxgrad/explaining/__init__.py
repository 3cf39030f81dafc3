"""What one step of descent will do: the slope, the curvature, the loss itself."""

from jaxgrad.explaining.explain import explain_step
from jaxgrad.explaining.report import EntryStep, LeafStep, StepExplanation

__all__ = ["EntryStep", "LeafStep", "StepExplanation", "explain_step"]
