"""Where a step of a frame stands: file, line and text, scope, iteration, branch."""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass

from jaxgrad.equations import Node, rule_place, source_of
from jaxgrad.flow.frames import Frame


@dataclass(frozen=True, eq=False)
class Line:
    """A step of the loss, and where it's written.

    Attributes:
      number: of the step, in the trace or in what was opened.
      operation: the primitive's name; of a custom rule the function's.
      function: the function that its line stands in.
      file: the file.
      line: the line.
      text: the line's text; empty where Python doesn't have it.
      scope: the name stack: modules and `jax.named_scope`s, from the outside in.
    """

    number: int
    operation: str
    function: str
    file: str
    line: int
    text: str
    scope: str


@dataclass(frozen=True, eq=False)
class Spot(Line):
    """A step of the loss, whose number it has, or one inside of it.

    Attributes:
      iteration: of the innermost loop that it stands in, if any.
      branch: of the innermost `cond` that it stands in, if any.
    """

    iteration: int | None
    branch: int | None


def line_of(frame: Frame, number: int) -> Line:
    """Where a frame's node is written."""
    node = frame.node(number)
    place = source_of(*node.lines)
    text = linecache.getline(place.file, place.line).strip()
    return Line(
        number,
        operation_of(node),
        place.function,
        place.file,
        place.line,
        text,
        scope_of(node),
    )


def spot_of(frame: Frame, number: int) -> Spot:
    """The place of a frame's node; one of a backward frame is the step's it is of."""
    line = line_of(frame, number)
    iteration = branch = None
    operation = line.operation
    while (outer := frame.outer) is not None:
        if outer.kind == "iteration" and iteration is None:
            iteration = outer.place
        if outer.kind == "branch" and branch is None:
            branch = outer.place
        frame, number = outer.frame, outer.number
        if outer.kind == "backward":
            operation = operation_of(frame.node(number))
    facts = {**vars(line), "number": number, "operation": operation}
    return Spot(**facts, iteration=iteration, branch=branch)


def operation_of(node: Node) -> str:
    """The primitive's name; of a custom rule the function's."""
    return rule_place(node.eqn).function if node.custom else node.name


_TRANSFORMED = re.compile(r"\w+\(([^()]*)\)")


def scope_of(node: Node) -> str:
    """The name stack of an equation and its callers, without the transformations."""
    parts = [str(eqn.source_info.name_stack) for eqn in (*node.callers, node.eqn)]
    text = "/".join(parts)
    while (plainer := _TRANSFORMED.sub(r"\1", text)) != text:
        text = plainer
    return "/".join(part for part in text.split("/") if part)
