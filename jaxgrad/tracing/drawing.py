"""How a trace looks: its verdict, a row per source line, and the notebook's folds."""

from __future__ import annotations

import html
import itertools
import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxgrad.flow import Block, Origin
from jaxgrad.tables import Table, number
from jaxgrad.tracing.numbers import brief, full, is_bad, norm_of
from jaxgrad.tracing.steps import Step

if TYPE_CHECKING:
    from jaxgrad.tracing.report import GradientTrace

# A screen's worth; `trace.steps` has everything.
_ROWS = 40
# So many are named; the rest are counted.
_NAMED = 6


def tables(trace: GradientTrace) -> list[Table]:
    """The verdict, what is bad, and one row per source line and scope."""
    found = [Table(verdict(trace), note="\n\n".join(_notes(trace)))]
    blocked = {k: v for k, v in trace.blocked.items() if v}
    if blocked:
        stopped: dict[tuple[str, str], list[str]] = {}
        for name, blocks in blocked.items():
            for block in blocks:
                stopped.setdefault((_line(block), block.why), []).append(name)
        rows = [[_leaves(names), *where] for where, names in stopped.items()]
        more = f"{len(rows) - _ROWS} more rows." if len(rows) > _ROWS else ""
        head = ["leaf", "line", "step"]
        found.append(Table("What stops it", head, rows[:_ROWS], more))
    return [*found, _lines(trace)]


def verdict(trace: GradientTrace) -> str:
    """What a trace found, in one sentence."""
    if not np.isfinite(trace.loss):
        return f"The loss is {number(trace.loss)}"
    bad = [name for name, ct in trace.leaves.items() if is_bad(ct)]
    if bad:
        return f"The gradient is not finite in {_names(bad)}"
    if trace.blocked:
        minimum = " (at a minimum)" if trace.ok else ""
        return f"The gradient is finite, and zero in {_names(trace.blocked)}{minimum}"
    return "The loss and its gradient are finite, and no leaf's gradient is zero"


def _names(names: Any) -> str:
    """Some names of leaves."""
    every = [f"`{name}`" for name in names]
    more = f" and {len(every) - _NAMED} others" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


def _leaves(names: list[str]) -> str:
    """The leaves that one step stops."""
    more = f"\n{len(names) - 3} more" if len(names) > 3 else ""
    return "\n".join(names[:3]) + more


def _line(block: Block | Origin) -> str:
    inside = "" if block.iteration is None else f", iteration {block.iteration}"
    return f"{os.path.basename(block.file)}:{block.line}{inside}"


def _notes(trace: GradientTrace) -> Iterator[str]:
    origin = trace.first_nonfinite
    if origin is not None:
        yield origin.sentence
        if origin.text:
            yield textwrap.indent(origin.text, "    ")
        if origin.harmless:
            yield "The loss and its gradient are finite all the same."
        yield origin.repair
    unused = [name for name, blocks in trace.blocked.items() if not blocks]
    if unused:
        yield f"The loss never uses {_names(unused)}."
    for name, dead in itertools.islice(trace.dead_entries.items(), _NAMED):
        axis = max(range(len(dead.slices)), key=lambda a: len(dead.slices[a]))
        places = dead.slices[axis]
        what = f"{name}: {dead.entries} of {dead.size} entries have the gradient zero"
        if places:
            some = ", ".join(map(str, places[:_NAMED]))
            dots = ", ..." if len(places) > _NAMED else ""
            what += f"; along axis {axis} all of {some}{dots}"
        yield f"{what}."
    if len(trace.dead_entries) > _NAMED:
        yield f"{len(trace.dead_entries) - _NAMED} more leaves have such entries."
    if trace.not_differentiable:
        yield f"Not differentiable: {_names(trace.not_differentiable)}."


class _Row(NamedTuple):
    """The steps of one line and scope.

    Attributes:
      steps: in order.
      flow: the largest norm of their cotangents.
    """

    steps: list[Step]
    flow: float


def _lines(trace: GradientTrace) -> Table:
    groups: dict[Any, list[Step]] = {}
    for step in trace.steps:
        groups.setdefault((step.scope, step.file, step.line), []).append(step)
    rows = [_Row(steps, _flow(steps)) for steps in groups.values()]
    widest = sorted(rows, key=lambda row: -row.flow)[:_ROWS]
    kept = {id(row) for row in widest}
    files = {step.file for step in trace.steps}
    scoped = any(step.scope for step in trace.steps)
    width = 45 - 21 * scoped - 12 * (len(files) > 1)
    lines = []
    for row in rows:
        if id(row) not in kept:
            continue
        last = _last(row.steps)
        file = "" if len(files) == 1 else f"{_tail(os.path.basename(last.file), 11)}:"
        lines.append(
            [
                f"{file}{last.line}",
                *([_tail(last.scope, 18)] if scoped else []),
                _head(last.text, width),
                brief(last.value),
                brief(last.cotangent),
            ]
        )
    note = (
        "value, gradient: of the row's last result; of an array the 2-norm, as ‖x‖. "
        f"{len(trace.steps)} steps in all."
    )
    if len(rows) > _ROWS:
        note += f" {len(rows) - _ROWS} more rows have a smaller flow of gradient."
    of = f" of {os.path.basename(files.pop())}" if len(files) == 1 else ""
    return Table(
        f"Loss {number(trace.loss)}, line by line{of}",
        ["line", *(["scope"] if scoped else []), "source", ">value", ">gradient"],
        lines,
        note,
    )


def _last(steps: list[Step]) -> Step:
    """The last step that has a gradient, or else the last."""
    return next((s for s in reversed(steps) if s.cotangent is not None), steps[-1])


def _flow(steps: list[Step]) -> float:
    """The largest norm of the steps' cotangents; infinite if one isn't finite."""
    return max(norm_of(step.cotangent) for step in steps)


def _head(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


_STYLE = (
    "<style>.jaxgrad td,.jaxgrad th{text-align:left;vertical-align:top;"
    "padding:2px 8px}.jaxgrad summary{cursor:pointer;padding:2px 0}"
    ".jaxgrad .bad{font-weight:bold;color:#b03a00}</style>"
)


def html_of(trace: GradientTrace) -> str:
    """The tables, and all steps in folds by scope; nothing is loaded from elsewhere."""
    parts = [_STYLE, '<div class="jaxgrad">']
    parts += [
        table.to_html().replace("<p>", '<p style="white-space:pre-wrap">')
        for table in trace.tables()[:-1]
    ]
    parts.append(f"<h4>{html.escape(f'Loss {number(trace.loss)}, step by step')}</h4>")
    for scope, run in itertools.groupby(trace.steps, key=lambda step: step.scope):
        steps = list(run)
        last = _last(steps)
        count = f"{len(steps)} steps" if len(steps) > 1 else "1 step"
        title = (
            f"{scope or last.function}: {count}, value "
            f"{brief(last.value)}, gradient {brief(last.cotangent)}"
        )
        bad = any(is_bad(s.value) or is_bad(s.cotangent) for s in steps)
        mark = ' class="bad"' if bad else ""
        head = "".join(
            f"<th>{name}</th>"
            for name in ("step", "operation", "inputs", "array", "value", "gradient",
                         "line")
        )  # fmt: skip
        rows = "".join(map(_html_row, steps))
        parts.append(
            f"<details><summary{mark}>{html.escape(title)}</summary>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            "</details>"
        )
    return "".join([*parts, "</div>"])


def _html_row(step: Step) -> str:
    cells = [
        f"#{step.number}",
        step.operation,
        ", ".join(step.inputs),
        f"{step.dtype} {list(step.shape)}",
        full(step.value),
        full(step.cotangent),
        f"{os.path.basename(step.file)}:{step.line} {step.text}",
    ]
    bad = is_bad(step.value) or is_bad(step.cotangent)
    mark = ' class="bad"' if bad else ""
    return f"<tr{mark}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells)}</tr>"
