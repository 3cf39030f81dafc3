"""Runs the JAX side: all values, the loss and its gradient, natively and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgrad.compiling import Program
from jaxgrad.equations import (
    Graph,
    Opaque,
    Place,
    Value,
    Walk,
    call,
    count_numbers,
    equations,
    evaluate,
    flow,
    graph_of,
    run,
    source_of,
    still,
)
from jaxgrad.flow import Frame, forward_of
from jaxgrad.operands import Operands, operands_of
from jaxgrad.precision import (
    Product,
    at_highest,
    backend_of,
    gradient_of,
    products,
    with_backward,
)
from jaxgrad.pytrees import Loss, PyTree, as_params, kind_of, loss_and_aux

Array = npt.NDArray[Any]

# What depends on no argument and is larger than this is a copy of a parameter in
# another layout: the parameters are compared by themselves.
_LARGE = 100_000
# Iterations of a scan that are opened: more layers than that are rarely stacked.
_TURNS = 64
_OPENED = ("scan", "cond")


@dataclass(frozen=True, eq=False)
class Made:
    """A value that the loss made.

    Attributes:
      array: the value.
      place: the user's line that made it.
      operation: the primitive that did.
      moves: whether it depends on the parameters.
    """

    array: Any
    place: Place
    operation: str
    moves: bool


@dataclass(frozen=True, eq=False)
class Values:
    """One evaluation of the loss.

    Attributes:
      loss: its value.
      gradients: per leaf, in its layout.
      made: gives the values made on the way, in order; a scan's come after it.
    """

    loss: float
    gradients: dict[str, Array]
    made: Callable[[], list[Made]]


class Traced:
    """A loss, traced in some dtype: its values and gradient for any parameters.

    Attributes:
      graph: its equations.
      wide: whether it is computed in float64.
    """

    def __init__(
        self,
        closed: Any,
        operands: Sequence[Any],
        names: Sequence[str],
        *,
        wide: bool,
        through: frozenset[Place] = frozenset(),
    ) -> None:
        count = len(names)
        self.graph: Graph = _without(graph_of(closed), through)
        self._closed, self._names = closed, names
        self.wide = wide
        self._count = count
        self._operands = list(operands)
        self._kept = _worth_keeping(self.graph, count, len(operands))
        aval = self.graph.avals[self.graph.results[0]]
        narrow = wide and any(
            self.graph.avals[v].dtype != np.float64
            for v in self.graph.moved_by(range(count), smoothly=True)
            if self.graph.inexact(v)
        )

        def evaluated(operands: Sequence[Any]) -> Any:
            one = jnp.ones(aval.shape, aval.dtype)
            made, cotangents = flow(self.graph, operands, range(count), {0: one}, ())
            result = self.graph.results[0]
            known = {**dict(enumerate(operands)), **self.graph.constants, **made}
            return (
                known[result],
                [cotangents[v] for v in range(count)],
                [made[v] for v in self._kept],
            )

        function: Callable[[Sequence[Any]], Any] = evaluated
        if narrow:
            shapes = [jax.typeof(x) for x in _narrowed(closed, operands)]
            equations = jax.make_jaxpr(evaluated)(shapes)
            tree = jax.tree.structure(jax.eval_shape(evaluated, shapes))

            def walk(operands: Sequence[Any]) -> Any:
                # Data too: a cast of them to fewer digits is left out on both sides.
                values = [
                    Value(x, x, moves=True)
                    if kind_of(x) == "differentiable"
                    else still(x)
                    for x in operands
                ]
                outputs = evaluate(equations, values, Walk())
                return jax.tree.unflatten(tree, [out.now for out in outputs])

            function = walk
        # float64 numbers don't depend on how XLA optimises, to what matters here.
        size = count_numbers(closed.jaxpr.eqns) if wide else None
        self._program = Program(function, size, self._operands)

    def __call__(self, leaves: Sequence[Any] | None = None) -> Values:
        """The values, for the parameters as they are, or for other ones."""
        operands = self._operands
        if leaves is not None:
            cast = [
                jnp.asarray(x, own.dtype)
                for x, own in zip(leaves, operands, strict=False)
            ]
            operands = [*cast, *operands[self._count :]]
        loss, gradients, made = self._program(operands)
        arrays = dict(zip(self._kept, made, strict=True))
        return Values(
            float(loss),
            dict(zip(self._names, map(np.asarray, gradients), strict=True)),
            lambda: self._in_order(operands, arrays),
        )

    def stops(self) -> list[Place]:
        """The lines that have a `stop_gradient`, in the order of the equations."""
        return list(dict.fromkeys(_stops(self.graph)))

    def through(self, places: Sequence[Place]) -> Traced:
        """The same loss, with the `stop_gradient`s of some lines left out."""
        return Traced(
            self._closed, self._operands, self._names,
            wide=self.wide, through=frozenset(places),
        )  # fmt: skip

    def _in_order(self, operands: Sequence[Any], arrays: dict[int, Any]) -> list[Made]:
        graph = self.graph
        moving = graph.moved_by(range(self._count), smoothly=False)
        known: list[Any] = [None] * len(graph.avals)
        known[: graph.inputs] = operands
        for v, value in {**graph.constants, **arrays}.items():
            known[v] = value
        frame = Frame(graph, known, {}, ("",) * graph.inputs, ())
        return list(_made(frame, moving, self._kept))


def _made(frame: Frame, moving: set[int] | None, kept: Sequence[int]) -> Any:
    keep = set(kept)
    for number, node in enumerate(frame.graph.nodes):
        place = source_of(*node.lines)
        for v in node.outputs:
            if v in keep and frame.graph.inexact(v):
                moves = moving is None or v in moving
                yield Made(frame.values[v], place, node.name, moves)
        opened = node.name in _OPENED and all(
            frame.values[v] is not None for v in node.operands
        )
        if opened:
            turns = node.eqn.params.get("length", 1)
            for turn in range(min(turns, _TURNS)):
                inner = forward_of(frame, number, turn)
                every = [v for n in inner.graph.nodes for v in n.outputs]
                inexact = [v for v in every if inner.graph.inexact(v)]
                yield from _made(inner, None, inexact)


def _stops(graph: Graph) -> Iterator[Place]:
    for node in graph.nodes:
        if node.name == "stop_gradient":
            yield source_of(*node.lines)
        elif node.name == "scan":
            inner = graph_of(node.eqn.params["jaxpr"], (*node.callers, node.eqn))
            yield from _stops(inner)


def _without(graph: Graph, places: frozenset[Place]) -> Graph:
    """A graph without the `stop_gradient`s of some lines, in its scans neither."""
    if not places:
        return graph
    same: dict[int, int] = {}
    nodes = []
    for node in graph.nodes:
        operands = tuple(same.get(v, v) for v in node.operands)
        if node.name == "stop_gradient" and source_of(*node.lines) in places:
            same[node.outputs[0]] = operands[0]
            continue
        eqn = node.eqn
        if node.name == "scan":
            closed = eqn.params["jaxpr"]
            inner = _without(graph_of(closed, (*node.callers, eqn)), places)
            body = jax.make_jaxpr(partial(_results, inner))(*closed.in_avals)
            eqn = eqn.replace(params={**eqn.params, "jaxpr": body})
        nodes.append(node._replace(eqn=eqn, operands=operands))
    results = tuple(same.get(v, v) for v in graph.results)
    return replace(graph, nodes=tuple(nodes), results=results)


def _results(graph: Graph, *operands: Any) -> list[Any]:
    values = run(graph, operands)
    return [values[v] for v in graph.results]


def _worth_keeping(graph: Graph, count: int, inputs: int) -> list[int]:
    """The variables to look at: floats, no copies of parameters; and what loops get.

    Without that they can't be opened.
    """
    fed = graph.moved_by(range(count, inputs), smoothly=False)
    given = {
        v for node in graph.nodes if node.name in _OPENED for v in node.operands
    }  # fmt: skip
    return [
        v
        for node in graph.nodes
        for v in node.outputs
        if v in given
        or (graph.inexact(v) and (v in fed or graph.avals[v].size <= _LARGE))
    ]


def _narrowed(closed: Any, operands: Sequence[Any]) -> list[Any]:
    """Operands in the dtypes that the equations take."""
    return [
        x if var.aval.dtype == x.dtype else jnp.zeros(x.shape, var.aval.dtype)
        for var, x in zip(closed.jaxpr.invars, operands, strict=True)
    ]


def _doubled(array: Any) -> Any:
    """An array of floats in float64: by NumPy, which needs no compiling."""
    if kind_of(array) != "differentiable":
        return array
    return jnp.asarray(np.asarray(array).astype(np.float64))


class JaxSide:
    """A JAX loss at its parameters.

    Attributes:
      names: the leaves that are differentiated.
      leaves: their values, by name.
      integers: the names of the leaves that have no gradient.
    """

    def __init__(
        self, loss: Loss, params: PyTree, args: tuple[Any, ...], *, has_aux: bool
    ) -> None:
        self.params = as_params(params)
        operands, names, integers = operands_of(self.params, args, None)
        self._loss, self._operands, self._has_aux = loss, operands, has_aux
        self.names = names
        self.leaves = dict(zip(names, operands.values, strict=True))
        self.integers = tuple(name for name, _ in integers)
        with jax.disable_jit(False):
            self._closed = self._trace(operands)
        self._native: Traced | None = None
        self._wide: Traced | None = None

    def _trace(self, operands: Operands) -> Any:
        def scalar(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
            output = self._loss(*operands.merge(values, fixed))
            return jnp.asarray(loss_and_aux(self._loss, output, self._has_aux)[0])

        def traced(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
            return call(scalar, values, fixed)

        return jax.make_jaxpr(traced)(operands.values, operands.fixed)

    @property
    def native(self) -> Traced:
        """The loss in its own dtypes."""
        if self._native is None:
            operands = [*self._operands.values, *self._operands.fixed]
            self._native = Traced(self._closed, operands, self.names, wide=False)
        return self._native

    @property
    def wide(self) -> Traced:
        """The loss in float64; to be made, and called, under `jax.enable_x64`.

        The loss is traced anew, so that its constants are in float64 too; where that
        fails, or draws random numbers, whose bits depend on the dtype, the equations
        that it has are evaluated in float64.

        Raises:
          Opaque: they can't be.
        """
        if self._wide is None:
            values = [_doubled(x) for x in self._operands.values]
            fixed = [_doubled(x) for x in self._operands.fixed]
            random = any(
                eqn.primitive.name.startswith(("random_", "threefry", "rng_"))
                for eqn in equations(self._closed)
            )
            if not random:
                operands = replace(self._operands, arrays=self._placed(values, fixed))
                try:
                    with jax.disable_jit(False):
                        closed = at_highest(self._trace(operands))
                    self._wide = Traced(
                        closed, [*values, *fixed], self.names, wide=True
                    )
                except Opaque:
                    raise
                except Exception:
                    self._wide = None  # a carry of float32, for instance
            if self._wide is None:
                operands_ = [*values, *self._operands.fixed]
                self._wide = Traced(self._closed, operands_, self.names, wide=True)
        return self._wide

    def _placed(self, values: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        chosen = dict(zip(self._operands.chosen, values, strict=True))
        stock = iter(fixed)
        return [
            chosen[place] if place in chosen else next(stock)
            for place in range(len(self._operands.arrays))
        ]

    def products(self) -> list[Product]:
        """The products, of the backward pass too, that have fewer digits."""
        every = with_backward(self._closed, len(self.names))
        return products(every, backend_of(self._operands.arrays))

    def highest(self) -> dict[str, Array]:
        """The native gradient, with all products at the highest precision."""
        closed = at_highest(gradient_of(self._closed, len(self.names)))
        with jax.disable_jit(False):
            run = jax.jit(partial(jax.core.eval_jaxpr, closed.jaxpr, closed.consts))
            gradients = run(*self._operands.values, *self._operands.fixed)
        return dict(zip(self.names, map(np.asarray, gradients), strict=True))

    def equations(self) -> list[Any]:
        """All equations of the loss, those inside others too."""
        return list(equations(self._closed))

    def literals(self) -> list[float]:
        """The scalar constants that the loss's equations have, without repeats."""
        return list(dict.fromkeys(_literals(self._closed)))


def _literals(closed: Any) -> Any:
    for eqn in equations(closed):
        for atom in eqn.invars:
            if isinstance(atom, jax.extend.core.Literal) and np.ndim(atom.val) == 0:
                value = float(np.real(atom.val))
                if np.isfinite(value):
                    # As it was written: 1e-05, not its neighbour in float32.
                    yield float(f"{value:.7g}")
