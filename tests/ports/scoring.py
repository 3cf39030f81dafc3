"""What a comparison said of a port, beside what it should have said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ports.case import Port

_BAD = ("differs", "missing", "values", "nonfinite")


@dataclass(frozen=True)
class Score:
    """What came out.

    Attributes:
      right: `ok` is what it should be.
      named: the module or parameter is named; `None` if there's none to name.
      first: it's named by the first difference, where there is one: once the forward
        passes part, the gradients of many parameters are wrong.
      cause: the first cause is the one that was built in; `None` for a right port.
      got: the first difference's module, the bad rows, and the causes.
    """

    right: bool
    named: bool | None
    first: bool | None
    cause: bool | None
    got: str


def score(port: Port, report: Any) -> Score:
    """Judges a report."""
    first = report.first_difference
    rows = [row for row in report.parameters if row.verdict in _BAD]
    accused = {n for row in rows for n in (row.torch_name, *row.path.split(" + "))}
    modules = set() if first is None else {first.module}
    kinds = [cause.kind for cause in report.causes]
    where = set(port.where)
    got = [f"ok={report.ok}", f"causes {kinds}"]
    if first is not None:
        got.append(f"first `{first.module}` {first.operation}")
    if rows:
        got.append("rows " + ", ".join(f"{r.torch_name} {r.verdict}" for r in rows[:4]))
    return Score(
        right=report.ok == (not port.kind),
        named=bool(where & (modules | accused)) if where else None,
        first=bool(where & (modules or accused)) if where else None,
        cause=kinds[:1] in [[k] for k in port.kind.split("|")] if port.kind else None,
        got="; ".join(got),
    )
