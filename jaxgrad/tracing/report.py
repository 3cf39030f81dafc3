"""What a trace found, as facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxgrad.flow import *
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

    @cached_property
    def blocked(self) -> Any:
        """All."""
        import numpy as np
        f=self._frame
        return {f.names[v]: blocks_of(f, v) for v in f.moving if not np.any(np.asarray(f.cotangents[v])!=0)}

    @cached_property
    def dead_entries(self) -> Any:
        """All."""
        f=self._frame
        d={f.names[v]: dead_entries_of(f.cotangents[v]) for v in f.moving}
        return {k: v for k,v in d.items() if v}
