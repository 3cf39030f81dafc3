"""What a comparison with PyTorch found, as facts, and how it is printed."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.comparing.trajectories import Trajectory
from jaxgrad.tables import Finding, Report, Table, findings_table, number

Verdict = Literal[
    "agrees", "rounding", "differs", "missing", "values", "nonfinite", "buffer"
]
BAD: tuple[Verdict, ...] = ("differs", "missing", "values", "nonfinite")
# Worst first, as the table has them.
_ORDER: tuple[Verdict, ...] = (
    "values", "nonfinite", "missing", "differs", "rounding", "agrees", "buffer"
)  # fmt: skip
_ROWS = 16
_CAUSES = 5
# A report's table has no more room for a layout.
_LAYOUT = 24
# More than float64 has, but for equal numbers.
_ALL_DIGITS = 15.9


class Losses(NamedTuple):
    """The loss on either side."""

    jax: float
    torch: float


@dataclass(frozen=True)
class Entry:
    """One entry, as JAX and as PyTorch has it; `index` is the JAX array's."""

    index: tuple[int, ...]
    jax: float
    torch: float


class Unmatched(NamedTuple):
    """Leaves and parameters without a partner on the other side."""

    jax: tuple[str, ...]
    torch: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ModuleOutput:
    """The output of one of PyTorch's submodules, and where it is in JAX.

    Attributes:
      module: the submodule's path; empty for the module itself.
      kind: its class.
      shape: the output's shape.
      error: the norm of the difference, over the output's norm; `None` where JAX has
        no such value, as where it computes the same in another way.
      layout: how JAX lays it out; empty where there is none.
      file: where JAX computes it.
      line: its line.
      text: what stands there.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    error: float | None
    layout: str
    file: str
    line: int
    text: str


@dataclass(frozen=True, eq=False)
class FirstDifference:
    """Where the two forward passes first part.

    Attributes:
      module: the path of the PyTorch submodule in whose lines it is; or, where it's in
        those of the whole module, of the submodule that comes next; empty if there is
        none, as in the loss function.
      before: whether it's the submodule that comes next.
      operation: PyTorch's function: `layer_norm`.
      torch_file: where it's called.
      torch_line: its line.
      error: the norm of the difference from the nearest of JAX's values, over the norm;
        `None` where none is near.
      file: where JAX computes that value, or what comes after the last that agrees.
      line: its line.
      text: what stands there.
      cause: why, where that is known.
    """

    module: str
    before: bool
    operation: str
    torch_file: str
    torch_line: int
    error: float | None
    file: str
    line: int
    text: str
    cause: Cause | None


@dataclass(frozen=True, eq=False)
class ParameterComparison:
    """The gradient of a JAX leaf, or a part of it, beside PyTorch's.

    Attributes:
      path: the leaf's path; several, joined by ` + `, that share one parameter.
      torch_name: the parameter's name.
      layout: how the leaf lays it out.
      verdict: `agrees`; `rounding`, if the gradients agree in float64; `differs`;
        `missing`, if one side has none; `values`, if the parameters themselves differ;
        `nonfinite`; `buffer`, which has no gradient in PyTorch.
      max_error: the largest difference of two entries.
      relative_error: the norm of the difference, over the norm of PyTorch's.
      ulps: the largest difference in units in the last place of PyTorch's number there.
      cosine: of the angle between the two.
      worst: the entry that differs most, of the gradient, or of the values.
      exact_error: the relative error in float64; `None` where it wasn't run.
      further: "JAX" or "PyTorch": which is further from the float64 gradient.
      cause: why they differ, where that is known.
    """

    path: str
    torch_name: str
    layout: str
    verdict: Verdict
    max_error: float
    relative_error: float
    ulps: float
    cosine: float
    worst: Entry | None
    exact_error: float | None = None
    further: str = ""
    cause: Cause | None = None


@dataclass(frozen=True, eq=False, repr=False)
class TorchComparison(Report):
    """What `compare_with_torch` found.

    Attributes:
      ok: values, loss, gradients and trajectories agree, to within rounding.
      loss: the loss, of JAX and of PyTorch.
      forward: each of PyTorch's submodules, in the order in which they returned.
      first_difference: where the forward passes first part; `None` if they don't.
      parameters: per leaf and parameter, how the gradients compare.
      unmatched: leaves and parameters without a partner.
      trajectory: how the optimizers compare, with `steps`.
      causes: why they differ, the likeliest first.
      findings: what to know beyond the tables.
    """

    ok: bool
    loss: Losses
    forward: tuple[ModuleOutput, ...]
    first_difference: FirstDifference | None
    parameters: tuple[ParameterComparison, ...]
    unmatched: Unmatched
    trajectory: Trajectory | None
    causes: tuple[Cause, ...]
    findings: tuple[Finding, ...]

    @property
    def digits(self) -> float:
        """The decimal digits to which all gradients agree."""
        errors = [p.relative_error for p in self.parameters if p.verdict == "agrees"]
        exact = [
            p.exact_error for p in self.parameters
            if p.verdict == "rounding" and p.exact_error is not None
        ]  # fmt: skip
        worst = max([*errors, *exact], default=0.0)
        return float(-np.log10(max(worst, 1e-16)))

    def tables(self) -> list[Table]:
        """The answer, the gradients, the forward pass, the optimizers, the rest."""
        tables = [Table(self._title(), note=self._why())]
        moved = [] if self.trajectory is None else [_trajectory(self.trajectory)]
        parted = [_forward(self)] if self.first_difference and self.forward else []
        bad = any(p.verdict in BAD for p in self.parameters)
        gradients = [_parameters(self)]
        tables += [*gradients, *parted, *moved] if bad else [*moved, *gradients]
        if self.findings:
            tables.append(findings_table(self.findings))
        return tables

    def _title(self) -> str:
        bad = [p for p in self.parameters if p.verdict in BAD]
        if self.ok:
            rounding = [p for p in self.parameters if p.verdict == "rounding"]
            how = f"to {self.digits:.1f} digits"
            if self.digits >= _ALL_DIGITS:
                how = "to the last bit"
            elif rounding:
                how += f" ({len(rounding)} of {len(self.parameters)} in float64 only)"
            return f"JAX and PyTorch agree {how}"
        first = self.first_difference
        values = [p for p in bad if p.verdict == "values"]
        if values:
            more = f" and {len(values) - 1} more" if len(values) > 1 else ""
            return f"The parameters differ: `{values[0].path}`{more}"
        if first is not None:
            where = f"at `{first.module}`" if first.module else "at the loss"
            if first.before:
                where = f"before `{first.module}`"
            return f"JAX and PyTorch part {where} ({first.operation})"
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            same = "The loss agrees, the" if self._loss_agrees() else "The"
            return f"{same} gradient differs in `{bad[0].path}`{more}"
        if self.trajectory is not None and not self.trajectory.ok:
            step = self.trajectory.first_step
            return f"The gradients agree; the optimizers part at step {step}"
        if self.unmatched.jax or self.unmatched.torch:
            names = [*self.unmatched.jax, *self.unmatched.torch]
            return f"`{names[0]}` has no partner on the other side"
        return "The losses differ"

    def _loss_agrees(self) -> bool:
        return bool(np.isclose(self.loss.jax, self.loss.torch, rtol=1e-5, atol=0))

    def _why(self) -> str:
        lines = [cause.text for cause in self.causes[:_CAUSES]]
        if len(self.causes) > _CAUSES:
            lines.append(f"And {len(self.causes) - _CAUSES} more causes.")
        first = self.first_difference
        if first is not None:
            at = f"PyTorch: {first.operation}"
            if first.torch_line:
                file = os.path.basename(first.torch_file)
                at += f" called at {file}, line {first.torch_line}"
            at += "."
            if first.line:
                at += f" JAX: {os.path.basename(first.file)}, line {first.line}: "
                at += f"`{first.text}`."
            if first.error is not None:
                at += f" They differ by {number(100 * first.error, 2)} % there."
            if not self.causes:
                lines.append("Why isn't known: no usual mistake explains it.")
            lines.append(at)
        lines.append(
            f"Loss: {number(self.loss.jax)} in JAX, "
            f"{number(self.loss.torch)} in PyTorch."
        )
        return "\n".join(lines)


def _parameters(report: TorchComparison) -> Table:
    ranked = sorted(report.parameters, key=lambda p: _ORDER.index(p.verdict))
    shown = ranked if len(ranked) <= _ROWS + 2 else ranked[:_ROWS]
    rows = [
        [
            p.path,
            p.torch_name,
            textwrap.shorten(p.layout, _LAYOUT, placeholder=" ..."),
            p.verdict,
            number(p.relative_error, 2),
            *([] if p.exact_error is None else [number(p.exact_error, 2)]),
        ]
        for p in shown
    ]
    if len(shown) < len(ranked):
        kinds: dict[str, int] = {}
        for p in ranked[len(shown) :]:
            kinds[p.verdict] = kinds.get(p.verdict, 0) + 1
        said = ", ".join(f"{n} {verdict}" for verdict, n in kinds.items())
        empty = [""] * (len(rows[0]) - 4)
        rows.append([f"and {len(ranked) - len(shown)} more", "", "", said, *empty])
    notes: list[str] = []
    for p in ranked:
        if p.verdict in BAD and p.worst is not None and len(notes) < 3:
            what = "value" if p.verdict == "values" else "gradient"
            notes.append(
                f"{p.path}: the {what} at {list(p.worst.index)} is "
                f"{number(p.worst.jax)} in JAX and {number(p.worst.torch)} in "
                f"PyTorch; cosine {number(p.cosine, 4)}."
            )
    exact = any(p.exact_error is not None for p in shown)
    note = "error: the norm of the difference of the gradients, over that of PyTorch's"
    notes.append(
        f"{note}; float64: with both sides in float64." if exact else f"{note}."
    )
    return Table(
        "Gradients",
        ["leaf", "PyTorch", "layout", "verdict", ">error", *[">float64"] * exact],
        rows,
        "\n".join(notes),
    )


def _trajectory(trajectory: Trajectory) -> Table:
    names = list(trajectory.losses)
    steps = list(range(trajectory.steps))
    if len(steps) > _ROWS:
        steps = [*steps[: _ROWS // 2], *steps[-_ROWS // 2 :]]
    rows = [
        [str(step + 1), *(number(trajectory.losses[n][step], 7) for n in names)]
        for step in steps
    ]
    note = "The parameters move alike."
    if not trajectory.ok:
        note = (
            f"They part at step {trajectory.first_step}: `{trajectory.torch_name}` "
            f"moved {number(100 * trajectory.step_error, 3)} % otherwise there."
        )
    return Table(
        "The loss before each step of the optimizers",
        ["step", *(f">{name}" for name in names)],
        rows,
        note,
    )


def _forward(report: TorchComparison) -> Table:
    rows = [
        [
            output.module or "(the module)",
            output.kind,
            "no counterpart" if output.error is None else number(output.error, 2),
            f"{os.path.basename(output.file)}, line {output.line}"
            if output.line
            else "",
        ]
        for output in report.forward
    ]
    if len(rows) > 2 * _ROWS:
        first = report.first_difference
        at = next(
            (i for i, o in enumerate(report.forward)
             if first is not None and o.module == first.module), 0,
        )  # fmt: skip
        start = max(0, min(at - _ROWS // 2, len(rows) - _ROWS))
        left = len(rows) - _ROWS
        rows = [*rows[start : start + _ROWS], [f"and {left} more", "", "", ""]]
    return Table(
        "Forward: what each PyTorch module returns",
        ["module", "class", ">error", "in JAX"],
        rows,
        "error: the norm of the difference from JAX's value, over the norm.",
    )
