"""What a trace found, as facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from jaxgrad.flow import (
    Block,
    DeadEntries,
    Frame,
    Origin,
    Summary,
    all_nonfinite,
    blocks_of,
    dead_entries_of,
    first_nonfinite,
)
from jaxgrad.tables import Finding, Report, Table, findings_table, plain
from jaxgrad.tracing import drawing
from jaxgrad.tracing.mermaid import mermaid_of
from jaxgrad.tracing.steps import Step, shown, steps_of


@dataclass(frozen=True, eq=False, repr=False)
class GradientTrace(Report):
    """What `trace_gradient` found.

    Large arrays stay on their devices. A summary of one is computed when it's asked
    for, or in the call, if other processes have parts of them.

    Attributes:
      loss: its value.
      gradient: as `jaxgrad.grad(loss)` gives it.
      name: the loss's name, file and line.
      not_differentiable: the leaves of integers and booleans.
      findings: what to know beyond the tables.
    """

    loss: float
    gradient: Any
    name: str
    not_differentiable: tuple[str, ...]
    findings: tuple[Finding, ...]
    _frame: Frame = field(repr=False)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All steps of the loss, in order."""
        return tuple(steps_of(self._frame))

    @cached_property
    def leaves(self) -> dict[str, np.ndarray | Summary | None]:
        """The gradient of each leaf: the numbers if they are few."""
        every = self._gradients.items()
        return {name: shown(self._frame, array) for name, array in every}

    @cached_property
    def first_nonfinite(self) -> Origin | None:
        """The origin of what is NaN or infinite in the loss or its gradient.

        Where both are finite, that of a NaN in between, which is then `harmless`.
        """
        return first_nonfinite(self._frame)

    @cached_property
    def nonfinite(self) -> tuple[Origin, ...]:
        """All origins of numbers that aren't finite, masked ones too, in order."""
        return all_nonfinite(self._frame)

    @cached_property
    def blocked(self) -> dict[str, tuple[Block, ...]]:
        """Per leaf whose gradient is all zero: the steps that stop it.

        None if the loss never uses the leaf.
        """
        frame = self._frame
        return {
            frame.names[v]: blocks_of(frame, v)
            for v in frame.moving
            if frame.summary(frame.cotangents[v]).zeros == frame.cotangents[v].size > 0
        }

    @cached_property
    def dead_entries(self) -> dict[str, DeadEntries]:
        """Per leaf that has some, but not only, zeros in its gradient: which."""
        return {
            name: dead_entries_of(array)
            for name, array in self._gradients.items()
            if 0 < self._frame.summary(array).zeros < array.size
        }

    @cached_property
    def ok(self) -> bool:
        """Whether the loss and its gradient are finite, and no leaf's is all zero.

        But for a leaf that is at a minimum.
        """
        return (self.first_nonfinite is None or self.first_nonfinite.harmless) and all(
            blocks and all(block.reason == "at a minimum" for block in blocks)
            for blocks in self.blocked.values()
        )

    def settle(self) -> None:
        """Computes all that it shows, now, while every process takes part."""
        for step in self.steps:
            for output in step.outputs:
                _ = output.value, output.cotangent
            _ = step.local_derivatives
        _ = self.leaves, self.nonfinite, self.blocked, self.dead_entries, self.ok

    @property
    def _gradients(self) -> Mapping[str, Any]:
        frame = self._frame
        return {frame.names[v]: frame.cotangents[v] for v in frame.moving}

    def tables(self) -> list[Table]:
        """The verdict, what is bad, and one row per source line and scope."""
        tables = drawing.tables(self)
        if self.findings:
            tables.insert(-1, findings_table(self.findings))
        return tables

    def _repr_html_(self) -> str:
        return drawing.html_of(self)

    def to_mermaid(self) -> str:
        """The graph of the loss, for Mermaid, which GitHub draws.

        Each step with its value and gradient, and a scalar's local derivative on the
        arrow; a large trace by scope.
        """
        return mermaid_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, steps and all: `json.dumps(..., allow_nan=False)` takes it."""
        steps = [
            {
                name: plain(getattr(step, name))
                for name in (
                    "number", "operation", "function", "file", "line", "text", "scope",
                    "inputs", "shape", "dtype", "value", "cotangent",
                )
            }
            for step in self.steps
        ]  # fmt: skip
        return {
            "ok": self.ok,
            "loss": plain(self.loss),
            "leaves": plain(self.leaves),
            "first_nonfinite": plain(self.first_nonfinite),
            "nonfinite": plain(self.nonfinite),
            "blocked": plain(self.blocked),
            "dead_entries": plain(self.dead_entries),
            "not_differentiable": plain(self.not_differentiable),
            "findings": plain(self.findings),
            "steps": steps,
        }
