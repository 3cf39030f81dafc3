"""A trace as a graph for Mermaid, which GitHub and notebooks draw."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
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
    leaves = _modules(list(trace.leaves))
    members_of: dict[str, list[str]] = {}
    for leaf, module in leaves.items():
        members_of.setdefault(module, []).append(leaf)
    bad = []
    for name, members in names.items():
        last = members[-1]
        lines.append(f'  {boxes[name]}["{_label(name, members)}"]:::step')
        if any(is_bad(s.value) or is_bad(s.cotangent) for s in members):
            bad.append(boxes[name])
        for step in members:
            slopes = step.local_derivatives if step is last else ()
            for place, source in enumerate(step.inputs):
                start = _start(source, steps, group, boxes, inputs, leaves)
                if start is not None and start != boxes[name]:
                    slope = slopes[place] if place < len(slopes) else None
                    label = "" if slope is None else f"|{number(slope, 4)}|"
                    edges.setdefault((start, boxes[name]), label)
    for name, box in inputs.items():
        those = members_of.get(name, [])
        text = _escape(name)
        if len(those) == 1:
            text += f"<br/>gradient {_short(trace.leaves[those[0]])}"
        elif those:
            text += f"<br/>{len(those)} leaves"
        if any(is_bad(trace.leaves[leaf]) for leaf in those):
            bad.append(box)
        lines.append(f'  {box}(["{text}"]):::{"leaf" if those else "data"}')
    lines += [f"  {a} -->{label} {b}" for (a, b), label in edges.items()]
    lines += [f"  {style}" for style in _STYLES]
    if bad:
        lines.append(f"  class {','.join(bad)} bad")
    return "\n".join(lines)


def _grouping(steps: Sequence[Step]) -> Callable[[Step], str]:
    """What steps are drawn as one box: one, those of a line, or of a scope."""

    def each(step: Step) -> str:
        return f"#{step.number} {step.operation}"

    def by_line(step: Step) -> str:
        return f"{step.scope or step.function}, line {step.line}"

    def to_depth(depth: int) -> Callable[[Step], str]:
        def name(step: Step) -> str:
            return "/".join(step.scope.split("/")[:depth]) or step.function

        return name

    numbers = {id(step): place for place, step in enumerate(steps)}

    def in_turn(step: Step) -> str:
        part = numbers[id(step)] * _BOXES // len(steps)
        return f"part {part + 1} of {_BOXES}"

    ways = [each, by_line, *(to_depth(depth) for depth in range(8, 0, -1)), in_turn]
    counted = {len({way(step) for step in steps}): way for way in reversed(ways)}
    # The finest that fits; a program without scopes is cut into parts.
    most = max(count for count in counted if count <= _BOXES)
    return counted[most if most > _BOXES // 8 else len({*map(in_turn, steps)})]


def _modules(leaves: list[str]) -> dict[str, str]:
    """Per leaf the box that it's drawn in: its own, or its module's if many."""
    for depth in (None, 4, 3, 2, 1):
        parts = [re.split(r"(?=[.\[])", leaf) for leaf in leaves]
        names = ["".join(part[:depth]) for part in parts]
        if len(set(names)) <= _BOXES:
            return dict(zip(leaves, names, strict=True))
    return dict.fromkeys(leaves, "all leaves")


def _start(
    source: str,
    steps: tuple[Step, ...],
    group: Callable[[Step], str],
    boxes: dict[str, str],
    inputs: dict[str, str],
    leaves: dict[str, str],
) -> str | None:
    """The box that an input comes from; `None` for a number written in the code."""
    if source.startswith("#") and source not in leaves:
        return boxes[group(steps[int(source[1:].partition("[")[0])])]
    with contextlib.suppress(ValueError):
        if source not in leaves:
            float(source)
            return None
    return inputs.setdefault(leaves.get(source, source), f"i{len(inputs)}")


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
