"""What a trace found, as facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxgrad.flow import Frame, Origin, all_nonfinite, first_nonfinite
from jaxgrad.tables import Report
from jaxgrad.tracing.steps import Step, steps_of


@dataclass(frozen=True, eq=False, repr=False)
class GradientTrace(Report):
    """x."""

    loss: float
    gradient: Any
    name: str
    not_differentiable: tuple[str, ...]
    _frame: Frame = field(repr=False)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All steps of the loss, in order."""
        return tuple(steps_of(self._frame))

    @cached_property
    def first_nonfinite(self) -> Origin | None:
        """The origin of what is NaN or infinite in the loss or its gradient."""
        return first_nonfinite(self._frame)

    @cached_property
    def nonfinite(self) -> tuple[Origin, ...]:
        """All."""
        return all_nonfinite(self._frame)
