"""A trace as a graph for Mermaid, which GitHub and notebooks draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from jaxgrad.tables import number
from jaxgrad.tracing.numbers import Shown, brief, is_bad
from jaxgrad.tracing.steps import Step

if TYPE_CHECKING:
    from jaxgrad.tracing.report import GradientTrace

# More boxes than this can't be read.
_BOXES = 40

# Okabe and Ito's colours, which the colour-blind tell apart; text stays black.
_STYLES = (
    "classDef leaf fill:#cfe8f5,stroke:#0072b2,color:#000",
    "classDef data fill:#f5f5f5,stroke:#777,color:#000",
    "classDef step fill:#fff,stroke:#333,color:#000",
    "classDef bad fill:#f9d5c2,stroke:#d55e00,stroke-width:3px,color:#000",
)


def mermaid_of(trace: GradientTrace) -> str:
    """The flowchart; steps in one box each if they are few, else one per scope."""
    steps = trace.steps
    group = _grouping(steps)
    names: dict[str, list[Step]] = {}
    for step in steps:
        names.setdefault(group(step), []).append(step)
    boxes = {name: f"s{i}" for i, name in enumerate(names)}
    lines = ["flowchart TD"]
    inputs: dict[str, str] = {}
    edges: dict[tuple[str, str], str] = {}
    bad = []
    for name, members in names.items():
        last = members[-1]
        lines.append(f'  {boxes[name]}["{_label(name, members)}"]:::step')
        if any(is_bad(s.value) or is_bad(s.cotangent) for s in members):
            bad.append(boxes[name])
        for step in members:
            slopes = step.local_derivatives if step is last else ()
            for place, source in enumerate(step.inputs):
                start = _start(source, steps, group, boxes, inputs)
                if start is not None and start != boxes[name]:
                    slope = slopes[place] if place < len(slopes) else None
                    label = "" if slope is None else f"|{number(slope, 4)}|"
                    edges.setdefault((start, boxes[name]), label)
    for name, box in inputs.items():
        leaf = name in trace.leaves
        text = _escape(name)
        if leaf:
            text += f"<br/>gradient {_short(trace.leaves[name])}"
            if is_bad(trace.leaves[name]):
                bad.append(box)
        lines.append(f'  {box}(["{text}"]):::{"leaf" if leaf else "data"}')
    lines += [f"  {a} -->{label} {b}" for (a, b), label in edges.items()]
    lines += [f"  {style}" for style in _STYLES]
    if bad:
        lines.append(f"  class {','.join(bad)} bad")
    return "\n".join(lines)


def _grouping(steps: Iterable[Step]) -> Callable[[Step], str]:
    """What steps are drawn as one box: none, those of a line, or of a scope."""

    def each(step: Step) -> str:
        return f"#{step.number} {step.operation}"

    def by_line(step: Step) -> str:
        return f"{step.scope or step.function}, line {step.line}"

    def to_depth(depth: int) -> Callable[[Step], str]:
        def name(step: Step) -> str:
            return "/".join(step.scope.split("/")[:depth]) or step.function

        return name

    ways = [each, by_line, *(to_depth(depth) for depth in (4, 3, 2, 1))]
    for way in ways:
        if len({way(step) for step in steps}) <= _BOXES:
            return way
    return ways[-1]


def _start(
    source: str,
    steps: tuple[Step, ...],
    group: Callable[[Step], str],
    boxes: dict[str, str],
    inputs: dict[str, str],
) -> str | None:
    """The box that an input comes from; `None` for a number written in the code."""
    if source.startswith("#"):
        return boxes[group(steps[int(source[1:].partition("[")[0])])]
    try:
        float(source)
    except ValueError:
        return inputs.setdefault(source, f"i{len(inputs)}")
    return None


def _label(name: str, steps: list[Step]) -> str:
    last = steps[-1]
    title = _escape(name)
    if len(steps) > 1:
        title += f"<br/>{len(steps)} steps"
    text = f"{title}<br/>value {_short(last.value)}"
    if last.cotangent is not None:
        text += f"<br/>gradient {_short(last.cotangent)}"
    return text


def _short(value: Shown) -> str:
    """Up to four numbers, or a norm."""
    if isinstance(value, np.ndarray) and value.size <= 4 and np.isrealobj(value):
        return ", ".join(number(x, 4) for x in value.ravel())
    return brief(value)


def _escape(text: str) -> str:
    """A text that Mermaid takes for a text, whatever is in it."""
    for sign, code in (
        ("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "#96;")
    ):  # fmt: skip
        text = text.replace(sign, code)
    return text
