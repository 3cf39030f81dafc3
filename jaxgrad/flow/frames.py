"""Frames: a graph at one point, with the values and cotangents of its variables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType

from jaxgrad.compiling import Program
from jaxgrad.equations import (
    Graph,
    Node,
    flow,
    run,
)
from jaxgrad.flow.summaries import Summary, is_number, summary_of
from jaxgrad.placing import keep, layouts_of, spans_processes, writes_one

Kind = Literal["iteration", "branch", "forward", "backward"]


class Opening(NamedTuple):
    """Where a frame is inside of another.

    Attributes:
      frame: the outer frame.
      number: its node that was opened.
      kind: what was opened of it: an iteration of a loop, a branch, the forward part of
        a custom rule, or what any step does in the backward pass.
      place: which iteration or branch.
    """

    frame: Frame
    number: int
    kind: Kind
    place: int = 0


@dataclass(frozen=True, eq=False)
class Frame:
    """A graph at one point.

    Attributes:
      graph: the equations.
      values: each variable's value.
      cotangents: the loss's gradient with respect to variables, where there is one.
      names: the inputs' names.
      moving: the inputs that depend on the parameters.
      outer: what it was opened from; `None` for the loss itself.
      opened: frames inside of this one, and what made them.
    """

    graph: Graph
    values: Sequence[Any]
    cotangents: Mapping[int, Any]
    names: tuple[str, ...]
    moving: tuple[int, ...]
    outer: Opening | None = None
    opened: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def moves(self) -> set[int]:
        """The variables that depend on the parameters."""
        return self.graph.moved_by(self.moving, smoothly=False)

    @cached_property
    def smooth(self) -> set[int]:
        """Those that do so by a slope."""
        return self.graph.moved_by(self.moving, smoothly=True)

    def node(self, number: int) -> Node:
        """One equation."""
        return self.graph.nodes[number]

    def operands(self, number: int) -> list[Any]:
        """The values of a node's inputs."""
        return [self.values[v] for v in self.node(number).operands]

    @cached_property
    def spans_processes(self) -> bool:
        """Whether a part of its inputs is on other processes' devices."""
        return spans_processes(list(self.values[: self.graph.inputs]))

    @contextlib.contextmanager
    def by_steps(self) -> Iterator[None]:
        """Where equations are run one by one: compiled each, and on the loss's mesh.

        On a mesh with explicit axes an equation that takes none of its arrays needs it.
        """
        frame = self
        while frame.outer is not None:
            frame = frame.outer.frame
        layouts = filter(None, layouts_of(list(frame.values[: frame.graph.inputs])))
        meshes: list[Any] = [
            x.mesh for x in layouts if AxisType.Explicit in x.mesh.axis_types
        ]
        on_mesh = jax.set_mesh(meshes[0]) if meshes else contextlib.nullcontext()
        with jax.disable_jit(False), on_mesh:
            yield

    def name_of(self, variable: int) -> str:
        """A leaf's path, an argument, a number, or `#` and the step that made it."""
        if variable < self.graph.inputs:
            return self.names[variable]
        if variable in self.graph.maker:
            number, place = self.graph.maker[variable]
            several = len(self.node(number).outputs) > 1
            return f"#{number}[{place}]" if several else f"#{number}"
        value = self.graph.constants[variable]
        if np.ndim(value) == 0 and is_number(value.dtype):
            return f"{np.asarray(value).item()!r}"
        return f"constant {value.dtype}{list(np.shape(value))}"

    def summary(self, array: Any) -> Summary:
        """The summary of one of its arrays."""
        return self.once(id(array), lambda: summary_of(array))  # type: ignore[no-any-return]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Makes something of this frame at the first call."""
        if key not in self.opened:
            self.opened[key] = make()
        return self.opened[key]


def flowing(
    graph: Graph,
    operands: Sequence[Any],
    moving: Sequence[int],
    seeds: Mapping[int, Any],
) -> Program:
    """Compiles `flow` for operands and cotangents of the results like those given.

    A cotangent is laid out over devices as its input is.
    """
    places = list(seeds)
    layouts = layouts_of([operands[v] for v in moving])

    def lower(smoothly: bool) -> Program:
        moved = graph.moved_by(moving, smoothly=smoothly)
        tapped = sorted(
            v for node in graph.nodes for v in node.outputs
            if v in moved and graph.inexact(v)
        )  # fmt: skip

        def program(operands: Sequence[Any], seeds: Sequence[Any]) -> Any:
            by_place = dict(zip(places, seeds, strict=True))
            rest = moving, by_place, tapped
            made, cotangents = flow(graph, operands, *rest)
            apart = any(layouts) and writes_one(
                jax.make_jaxpr(lambda x: flow(graph, x, *rest)[1])(operands)
            )
            kept = keep([cotangents[v] for v in moving], layouts, apart)
            return made, {**cotangents, **dict(zip(moving, kept, strict=True))}

        return Program(program, None, operands, list(seeds.values()))

    try:
        return lower(smoothly=False)
    except Exception:
        # What comes after a `stop_gradient`, a while loop for instance, may have no
        # reverse mode, and JAX itself never asks for it.
        return lower(smoothly=True)


def frame_of(
    graph: Graph,
    operands: Sequence[Any],
    names: Sequence[str],
    moving: Sequence[int] = (),
    seeds: Mapping[int, Any] | None = None,
    outer: Opening | None = None,
    program: Any = None,
) -> Frame:
    """Evaluates a graph: with cotangents if any result has one.

    `program` is what `flowing` or `running` made for it; made anew if `None`.
    """
    seeds = dict(seeds or {})
    moving = tuple(v for v in moving if graph.inexact(v)) if seeds else ()
    if program is None:
        program = (
            flowing(graph, operands, moving, seeds)
            if moving
            else running(graph, operands)
        )
    if moving:
        made, cotangents = program(operands, list(seeds.values()))
    else:
        made, cotangents = program(operands), {}
    values: list[Any] = [None] * len(graph.avals)
    values[: graph.inputs] = operands
    for variable, value in {**graph.constants, **made}.items():
        values[variable] = value
    return Frame(graph, values, cotangents, tuple(names), moving, outer)


def running(graph: Graph, operands: Sequence[Any]) -> Program:
    """Compiles the values of all nodes' outputs."""

    def program(operands: Sequence[Any]) -> dict[int, Any]:
        values = run(graph, operands)
        return {v: values[v] for node in graph.nodes for v in node.outputs}

    return Program(program, None, operands)
