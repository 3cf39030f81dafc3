"""A jaxpr as one flat list of steps, and the values and cotangents of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxgrad.equations.sites import CUSTOM, DROPPED, INLINE, body_of
from jaxgrad.equations.values import bind, literal

# What has no slope, whatever it is applied to.
FLAT = ("stop_gradient", "floor", "ceil", "round", "sign")


class Node(NamedTuple):
    """One equation of a graph.

    Attributes:
      eqn: the equation.
      operands: its inputs, as the graph's variables.
      outputs: its outputs, as the graph's variables.
      callers: the equations that it stands in, from the outside in.
    """

    eqn: Any
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.eqn.primitive.name)

    @property
    def custom(self) -> bool:
        """Whether it has a custom rule."""
        return self.name in CUSTOM

    @property
    def lines(self) -> tuple[Any, ...]:
        """The equations that say where it came from, the nearest first."""
        return (self.eqn, *reversed(self.callers))


@dataclass(frozen=True, eq=False)
class Graph:
    """Equations in order, over numbered variables; what only wraps others is opened.

    Attributes:
      inputs: how many inputs there are: the first variables.
      nodes: the equations.
      results: the variables of the outputs.
      avals: each variable's shape and dtype.
      constants: the numbers that the code brings along, by variable.
      literals: the variables of those that are written in it.
    """

    inputs: int
    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    avals: tuple[Any, ...]
    constants: Mapping[int, Any]
    literals: frozenset[int]

    @cached_property
    def maker(self) -> dict[int, tuple[int, int]]:
        """Per variable that is an output: of which node, and which of its outputs."""
        return {
            variable: (number, place)
            for number, node in enumerate(self.nodes)
            for place, variable in enumerate(node.outputs)
        }

    @cached_property
    def users(self) -> dict[int, tuple[int, ...]]:
        """Per variable: the nodes that take it."""
        users: dict[int, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for variable in dict.fromkeys(node.operands):
                users.setdefault(variable, []).append(number)
        return {variable: tuple(numbers) for variable, numbers in users.items()}

    def inexact(self, variable: int) -> bool:
        """Whether a variable is one of real or complex numbers."""
        return bool(jnp.issubdtype(self.avals[variable].dtype, jnp.inexact))

    def moved_by(self, variables: Iterable[int], *, smoothly: bool) -> set[int]:
        """The variables that depend on some; `smoothly`: by a slope, be it zero."""
        moved = set(variables)
        for node in self.nodes:
            if smoothly and node.name in FLAT:
                continue
            if any(v in moved for v in node.operands):
                moved |= {v for v in node.outputs if not smoothly or self.inexact(v)}
        return moved

    @cached_property
    def reaching(self) -> set[int]:
        """The variables on which the results depend by a slope, be it zero."""
        reaching = set(self.results)
        for node in reversed(self.nodes):
            if node.name not in FLAT and any(v in reaching for v in node.outputs):
                reaching |= {v for v in node.operands if self.inexact(v)}
        return reaching

    @cached_property
    def needed(self) -> set[int]:
        """The variables on which the results depend in any way."""
        needed = set(self.results)
        for node in reversed(self.nodes):
            if any(v in needed for v in node.outputs):
                needed |= set(node.operands)
        return needed


def graph_of(closed: Any, callers: tuple[Any, ...] = ()) -> Graph:
    """The graph of a closed jaxpr that stands inside the callers."""
    nodes: list[Node] = []
    avals: list[Any] = []
    constants: dict[int, Any] = {}
    literals: set[int] = set()

    def variable(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def walk(closed: Any, operands: Sequence[int], callers: Any) -> list[int]:
        jaxpr = closed.jaxpr
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, operands, strict=True))
        for constvar, const in zip(jaxpr.constvars, closed.consts, strict=True):
            numbers[constvar] = variable(constvar.aval)
            constants[numbers[constvar]] = const

        def read(atom: Any) -> int:
            if not isinstance(atom, jax.extend.core.Literal):
                return numbers[atom]
            number = variable(atom.aval)
            constants[number] = literal(atom)
            literals.add(number)
            return number

        for eqn in jaxpr.eqns:
            if eqn.primitive.name in DROPPED:
                continue
            inputs = tuple(map(read, eqn.invars))
            if eqn.primitive.name in INLINE:
                outputs = walk(body_of(eqn), inputs, (*callers, eqn))
            else:
                outputs = [variable(var.aval) for var in eqn.outvars]
                nodes.append(Node(eqn, inputs, tuple(outputs), callers))
            numbers.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [variable(var.aval) for var in closed.jaxpr.invars]
    results = walk(closed, inputs, callers)
    return Graph(
        len(inputs),
        tuple(nodes),
        tuple(results),
        tuple(avals),
        constants,
        frozenset(literals),
    )


def run(
    graph: Graph,
    operands: Sequence[Any],
    tap: Callable[[int, Any], Any] = lambda variable, value: value,
) -> list[Any]:
    """The value of each variable; what `tap` makes of it is what others get."""
    values: list[Any] = [None] * len(graph.avals)
    values[: graph.inputs] = operands
    for variable, const in graph.constants.items():
        values[variable] = const
    for node in graph.nodes:
        outputs = bind(node.eqn, [values[v] for v in node.operands])
        for variable, value in zip(node.outputs, outputs, strict=True):
            values[variable] = tap(variable, value)
    return values


def _spread(number: Any, aval: Any) -> Any:
    """A number at every entry, laid out as an array whose type says how."""
    if AxisType.Explicit in aval.sharding.mesh.axis_types:
        return jnp.broadcast_to(number, aval.shape, out_sharding=aval.sharding)
    return jnp.broadcast_to(number, aval.shape)


def flow(
    graph: Graph,
    operands: Sequence[Any],
    moving: Sequence[int],
    seeds: Mapping[int, Any],
    tapped: Iterable[int],
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Values of all nodes' outputs, and cotangents of the moving inputs and the tapped.

    The cotangents are those of JAX's own backward pass: each tapped variable has a zero
    added, and the whole is differentiated once with respect to the moving inputs and
    those zeros. A negative zero changes no number, not even 0 itself.

    Args:
      graph: the equations.
      operands: their inputs.
      moving: the inputs to differentiate.
      seeds: the cotangents of results, by their place.
      tapped: variables of real or complex numbers.
    """
    taps = {v: jnp.full_like(jnp.empty((), graph.avals[v].dtype), -0.0) for v in tapped}
    taps = {v: _spread(x, graph.avals[v]) for v, x in taps.items()}

    def forward(chosen: list[Any], taps: dict[int, Any]) -> Any:
        inputs = list(operands)
        for place, value in zip(moving, chosen, strict=True):
            inputs[place] = value

        def tap(variable: int, value: Any) -> Any:
            return jax.lax.add(value, taps[variable]) if variable in taps else value

        values = run(graph, inputs, tap)
        made = {v: values[v] for node in graph.nodes for v in node.outputs}
        return [values[graph.results[place]] for place in seeds], made

    chosen = [operands[place] for place in moving]
    _, pull, values = jax.vjp(forward, chosen, taps, has_aux=True)
    of_inputs, of_taps = pull(list(seeds.values()))
    return values, {**dict(zip(moving, of_inputs, strict=True)), **of_taps}
