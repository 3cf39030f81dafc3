"""What an explanation of a step holds, as facts, and how it is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxgrad.tables import Finding, Report, Table, findings_table, number

_ENTRIES, _LEAVES = 24, 20  # printed
_WARNINGS = {
    "nonfinite": "NaN or infinity in the gradient (`jaxgrad.trace_gradient` says why).",
    "zero": "the gradient is exactly zero (`jaxgrad.trace_gradient` says why).",
    "lost": "rounding leaves every entry where it was.",
    "exploding": "a step above 1: what the leaf held is gone.",
    "vanishing": "a step below 1e-4 of the longest leaf's.",
}


@dataclass(frozen=True)
class EntryStep:
    """One entry of a small leaf.

    Attributes:
      index: where it stands in its leaf.
      value: the parameter.
      gradient: its gradient.
      says: what the gradient says: "increase: the loss falls", or "decrease: ...".
      after: the parameter after the step.
      rank: 1 for the strongest influence (the largest gradient by its absolute value)
        of all entries listed; equal ones share a rank.
      signal: the loss's derivative by the prediction, of a linear model and one row.
      input: what the entry is multiplied by there; `signal * input` is the gradient.
    """

    index: tuple[int, ...]
    value: float
    gradient: float
    says: str
    after: float
    rank: int
    signal: float | None = None
    input: float | None = None


@dataclass(frozen=True, eq=False)
class LeafStep:
    """One leaf's part in the step.

    Attributes:
      path: the leaf's path.
      shape: its shape.
      dtype: its dtype.
      gradient_norm: the 2-norm of its gradient; `None` if it has none.
      rank: 1 for the strongest influence (the largest norm); equal ones share a rank.
      relative_step: how far the step moves it, over its size, both as root mean square
        of the entries; the size is at least that of all parameters, since a bias near
        zero isn't exploding. `None` where they are zero, or the gradient isn't finite.
      warning: empty, or `nonfinite`; `zero`; `lost`: rounding leaves every entry where
        it was; `exploding`: the relative step is above 1; `vanishing`: it is below 1e-4
        of the longest; `not_differentiable`: integers or booleans, passed over.
      entries: one `EntryStep` per entry, if there are 8 or fewer and all is finite.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    gradient_norm: float | None = None
    rank: int | None = None
    relative_step: float | None = None
    warning: str = ""
    entries: tuple[EntryStep, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class StepExplanation(Report):
    """What `explain_step` found.

    Attributes:
      ok: all is finite, and the step lowers the loss (at a zero gradient it doesn't).
      learning_rate: the step's.
      loss: the loss now.
      gradient_norm: the 2-norm of the whole gradient.
      leaves: one `LeafStep` per leaf of arrays, those of integers last.
      findings: what to know beyond the tables.
      loss_after: the loss after the step. This and all below is `None` where the loss
        or the gradient isn't finite, and there is no step.
      predicted_decrease: what the gradient alone predicts.
      decrease: the real one, `loss - loss_after`; `None` if that isn't finite.
      curvature: the loss's second derivative along the unit gradient; `None` also at a
        zero gradient, as all up to `rounding`.
      quadratic_limit: 2 / curvature, from where on the quadratic model has risen, and
        twice where it's lowest; `None`, for no limit, if the curvature isn't positive.
      best_rate: the learning rate, below `first_rise`, that lowers the loss most;
        `None` if none lowers it by more than rounding, or it still falls at the last.
      first_rise: the first learning rate found at which the loss is above its value
        now, or not finite; `None` if there's none up to `largest_rate`.
      largest_rate: the largest learning rate tried.
      rounding: how far off a value of the loss may be; a rise must be larger.
      sharpness: the largest eigenvalue of the Hessian, on request.
      predictions: a linear neuron's prediction before and after the step, for one row.
    """

    ok: bool
    learning_rate: float
    loss: float
    gradient_norm: float
    leaves: tuple[LeafStep, ...]
    findings: tuple[Finding, ...]
    loss_after: float | None = None
    predicted_decrease: float | None = None
    decrease: float | None = None
    curvature: float | None = None
    quadratic_limit: float | None = None
    best_rate: float | None = None
    first_rise: float | None = None
    largest_rate: float | None = None
    rounding: float | None = None
    sharpness: float | None = None
    predictions: tuple[float, float] | None = None

    def tables(self) -> list[Table]:
        """The verdict and the step, the leaves, their entries, the rest."""
        tables = [self._step(), self._leaves()]
        entries = [
            (leaf.path + "".join(f"[{i}]" for i in entry.index), entry)
            for leaf in self.leaves
            for entry in leaf.entries
        ]
        if entries:
            tables.append(self._entries(entries))
        if any(entry.signal is not None for _, entry in entries):
            tables.append(self._signals(entries))
        if self.findings:
            tables.append(findings_table(self.findings))
        return tables

    def _title(self) -> str:
        now, after = number(self.loss), self.loss_after
        if not math.isfinite(self.loss):
            return f"The loss is {now}: there is no step to explain"
        if self.predicted_decrease is None or after is None:
            return "The gradient isn't finite: the step would spoil the parameters"
        if self.gradient_norm == 0:
            return f"The gradient is zero: the step does nothing, the loss stays {now}"
        verb = "falls" if self.ok else "rises" if after > self.loss else "goes"
        title = f"At learning rate {number(self.learning_rate)} the loss {verb} from "
        title += f"{now} to {number(after)}"
        predicted = number(self.predicted_decrease)
        if self.decrease is None or not 0 < self.decrease <= self.predicted_decrease:
            return f"{title}, where the gradient predicts a fall by {predicted}"
        title += f": {number(self.decrease)} of the {predicted} that the gradient "
        return f"{title}predicts"

    def _step(self) -> Table:
        k, predicted, limit = self.curvature, self.predicted_decrease, "unknown"
        if predicted is None:
            return Table(self._title(), note="`jaxgrad.trace_gradient` says why.")
        note = f"Norm of the gradient: {number(self.gradient_norm)}."
        if k is not None:
            bent, limit = number(k), "none"
            note += f" Curvature along the gradient: {bent}, so that the quadratic "
            ends = f"is lowest at 1/{bent} and rises from 2/{bent}."
            note += f"model {ends if k > 0 else 'sets no limit to the learning rate.'}"
        if self.sharpness is not None:
            note += f" Largest eigenvalue of the Hessian: {number(self.sharpness)}."
        if self.largest_rate is None:  # no direction to go in
            return Table(self._title(), note=note)
        model = None if k is None else predicted * (1 - self.learning_rate * k / 2)
        lowest = None if self.quadratic_limit is None else self.quadratic_limit / 2
        last = f"up to {number(self.largest_rate, 3)}"
        stuck = {f.kind for f in self.findings} & {"minimum", "no_descent"}
        best = "none" if stuck or self.first_rise is not None else f"falls {last}"
        rows = [
            ["decrease of this step", number(predicted), _cell(model, limit)],
            ["best learning rate", "none", _cell(lowest, limit)],
            ["loss rises from rate", "none", _cell(self.quadratic_limit, limit)],
        ]
        rows[0].append(_cell(self.decrease, "-"))
        rows[1].append(_cell(self.best_rate, best))
        rows[2].append(_cell(self.first_rise, f"none {last}"))
        columns = ["", ">by the gradient", ">and curvature", ">the loss itself"]
        return Table(self._title(), columns, rows, note)

    def _leaves(self) -> Table:
        ranked = sorted(self.leaves, key=lambda leaf: leaf.rank or len(self.leaves) + 1)
        shown = sorted(ranked, key=lambda leaf: not leaf.warning)[:_LEAVES]
        rows = []
        for leaf in shown:
            norm, whole = leaf.gradient_norm, self.gradient_norm
            known = leaf.rank is not None and norm is not None and whole > 0
            share = f"{100 * ((norm or 0.0) / whole) ** 2:.3g} %" if known else ""
            row = [leaf.path, f"{leaf.dtype} {list(leaf.shape)}", _cell(norm), share]
            row += [_cell(leaf.relative_step, digits=2), leaf.warning.replace("_", " ")]
            rows.append(row)
        if len(ranked) > len(shown):
            rows.append([f"and {len(ranked) - len(shown)} more", *[""] * 5])
        columns = ["leaf", "array", ">norm", ">influence", ">step", "warning"]
        note = (
            "norm: the 2-norm of the gradient. influence: the share of the decrease "
            "that it predicts. step: how far the step moves the leaf, over the leaf's "
            "size."
        )
        said = {leaf.warning for leaf in shown}
        note += "".join(f" {k}: {v}" for k, v in _WARNINGS.items() if k in said)
        return Table("Leaves", columns, rows, note)

    def _entries(self, entries: list[tuple[str, EntryStep]]) -> Table:
        rows = []
        for name, e in sorted(entries, key=lambda entry: entry[1].rank)[:_ENTRIES]:
            row = [name, number(e.value), number(e.gradient), e.says.partition(":")[0]]
            rows.append([*row, number(e.after), str(e.rank)])
        more = len(entries) - len(rows)
        note = f"And {more} more entries." if more else ""
        columns = ["parameter", ">value", ">gradient", "to lower the loss"]
        columns += [">after", ">rank"]
        return Table("Entries of small leaves", columns, rows, note)

    def _signals(self, entries: list[tuple[str, EntryStep]]) -> Table:
        rows, size, note = [], 0.0, ""
        for name, e in entries:
            signal, factor = e.signal or 0.0, e.input or 0.0
            size += factor**2
            cells = signal, factor, signal * factor, e.gradient
            rows.append([name, *map(number, cells)])
        if self.predictions is not None:
            before, after = map(number, self.predictions)
            note = (
                f"The prediction goes from {before} to {after}: the step moves it by "
                f"-(learning rate) x signal x (sum of the squared inputs), "
                f"-{number(self.learning_rate)} x {rows[0][1]} x {number(size)}."
            )
        columns = ["parameter", ">signal", ">input", ">product", ">gradient"]
        return Table("Error signal times input", columns, rows, note)


def _cell(value: float | None, missing: str = "", digits: int = 6) -> str:
    return missing if value is None else number(value, digits)
