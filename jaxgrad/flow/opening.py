"""Opens a step: an iteration, a branch, a custom rule, and what any does backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad.compiling import Program
from jaxgrad.equations import (
    Graph,
    Node,
    bind_with_lines,
    body_of,
    call,
    graph_of,
    run,
    scan_flags,
    scan_parts,
)
from jaxgrad.flow.frames import Frame, Opening, flowing, frame_of, running
from jaxgrad.placing import layouts_of


def opens(node: Node) -> bool:
    """Whether a node has equations of its own: a loop, a branch, a custom rule."""
    return node.name in ("scan", "while", "cond") or node.custom


def forward_of(frame: Frame, number: int, index: int = 0) -> Frame:
    """What is inside of a node that `opens`: an iteration, a branch, a rule's forward.

    Iteration `index` of a scan is the one of row `index`; of a while loop the
    one after `index` others.

    Raises:
      IndexError: there is no such iteration.
    """
    node = frame.node(number)
    if node.name == "scan":
        return _iteration(frame, number, index)
    if node.name == "while":
        return _turn(frame, number, index)
    if node.name == "cond":
        return frame.once((number, "branch"), partial(_branch, frame, number))  # type: ignore[no-any-return]
    return frame.once((number, "forward"), partial(_rule, frame, number))  # type: ignore[no-any-return]


def _rule(frame: Frame, number: int) -> Frame:
    node = frame.node(number)
    graph = graph_of(body_of(node.eqn), (*node.callers, node.eqn))
    names = [_outer_name(frame, v) for v in node.operands]
    outer = Opening(frame, number, "forward")
    return frame_of(graph, frame.operands(number), names, outer=outer)


def _branch(frame: Frame, number: int) -> Frame:
    node = frame.node(number)
    branches = node.eqn.params["branches"]
    which, *operands = frame.operands(number)
    index = int(np.clip(int(which), 0, len(branches) - 1))
    graph = graph_of(branches[index], (*node.callers, node.eqn))
    moving = [i for i, v in enumerate(node.operands[1:]) if v in frame.moves]
    return frame_of(
        graph,
        operands,
        [_outer_name(frame, v) for v in node.operands[1:]],
        moving,
        _seeds(frame, node),
        Opening(frame, number, "branch", index),
    )


def _seeds(frame: Frame, node: Node) -> dict[int, Any]:
    """The cotangents of a node's outputs, by place, that JAX takes for not zero."""
    return {
        place: frame.cotangents[v]
        for place, v in enumerate(node.outputs)
        if v in frame.cotangents and v in frame.graph.reaching
    }


def _outer_name(frame: Frame, variable: int) -> str:
    name = frame.name_of(variable)
    return f"outer {name}" if name.startswith("#") else name


class Scan(NamedTuple):
    """A scan, opened.

    Attributes:
      carries: what each iteration is given, stacked by row.
      cotangents: of those, by place in the carry.
      counts: how many constants, carried values and rows the body takes.
      order: the rows, in the order of the iterations.
      graph: the body's.
      moving: the body's inputs that depend on the parameters.
      seeds: the cotangents of the scan's outputs, by place.
    """

    carries: list[Any]
    cotangents: dict[int, Any]
    counts: tuple[int, int, int]
    order: range
    graph: Graph
    moving: tuple[int, ...]
    seeds: dict[int, Any]


def scan_of(frame: Frame, number: int) -> Scan:
    """What all iterations of a scan are given, by one more run of it."""
    return frame.once((number, "scan"), partial(_scan, frame, number))  # type: ignore[no-any-return]


def _scan(frame: Frame, number: int) -> Scan:
    node = frame.node(number)
    params, operands = node.eqn.params, frame.operands(number)
    graph = graph_of(params["jaxpr"], (*node.callers, node.eqn))
    consts, carry, xs = scan_parts(params, operands)
    flags = [v in frame.moves for v in node.operands]
    outputs = scan_flags(params, flags)
    first, count = len(consts), len(carry)
    moved = [*flags[:first], *outputs[:count], *flags[first + count :]]
    seeds = _seeds(frame, node)
    moving = tuple(i for i, m in enumerate(moved) if m and graph.inexact(i))
    tapped = [i - first for i in moving if first <= i < first + count] if seeds else []
    length = params["length"]

    def whole(taps: dict[int, Any], operands: Sequence[Any]) -> Any:
        consts, carry, xs = scan_parts(params, operands)

        def step(carry: list[Any], row: Any) -> Any:
            row, taps = row
            carry = [
                lax.add(value, taps[k]) if k in taps else value
                for k, value in enumerate(carry)
            ]
            values = run(graph, [*consts, *carry, *row])
            out = [values[v] for v in graph.results]
            return out[:count], (carry, out[count:])

        last, (carries, ys) = lax.scan(
            step, carry, (xs, taps), length=length, reverse=params["reverse"]
        )
        outputs = [*last, *ys]
        return [outputs[place] for place in seeds], carries

    def program(operands: Sequence[Any], seeds: list[Any]) -> Any:
        taps = {
            k: jnp.full((length, *carry[k].shape), -0.0, carry[k].dtype) for k in tapped
        }
        if not tapped:
            return whole({}, operands)[1], {}
        _, pull, carries = jax.vjp(
            lambda taps: whole(taps, operands), taps, has_aux=True
        )
        return carries, pull(seeds)[0]

    given = operands, list(seeds.values())
    carries, cotangents = Program(program, None, *given)(*given)
    rows = range(length)
    return Scan(
        carries=list(carries),
        cotangents=dict(cotangents),
        counts=(first, count, len(xs)),
        order=rows[::-1] if params["reverse"] else rows,
        graph=graph,
        moving=moving if seeds else (),
        seeds=seeds,
    )


def _body_places(
    seeds: Mapping[int, Any], cotangents: Mapping[int, Any], count: int
) -> list[int]:
    """The results of a scan's body that have a cotangent in every iteration."""
    carried = sorted({p for p in seeds if p < count} | set(cotangents))
    return [*carried, *(p for p in seeds if p >= count)]


def _iteration(frame: Frame, number: int, row: int) -> Frame:
    node, scan = frame.node(number), scan_of(frame, number)
    length = len(scan.order)
    if not 0 <= row < length:
        raise IndexError(
            f"Step {number} is a scan of {length} iterations; iteration {row} was "
            "asked for."
        )
    first, count, _ = scan.counts
    operands = frame.operands(number)
    consts, _, xs = scan_parts(node.eqn.params, operands)
    now = [*consts, *(c[row] for c in scan.carries), *(x[row] for x in xs)]
    after = scan.order.index(row) + 1
    seeds: dict[int, Any] = {}
    for place in _body_places(scan.seeds, scan.cotangents, count):
        if place >= count:
            seeds[place] = scan.seeds[place][row]
        elif after < length:
            if place in scan.cotangents:
                seeds[place] = scan.cotangents[place][scan.order[after]]
            else:
                seeds[place] = jnp.zeros_like(scan.seeds[place])
        elif place in scan.seeds:
            seeds[place] = scan.seeds[place]
        else:
            aval = scan.graph.avals[scan.graph.results[place]]
            seeds[place] = jnp.zeros(aval.shape, aval.dtype)
    names = [_outer_name(frame, v) for v in node.operands]
    names[first : first + count] = [f"carry[{k}]" for k in range(count)]
    names[first + count :] = [f"{name}[{row}]" for name in names[first + count :]]
    outer = Opening(frame, number, "iteration", row)
    # All iterations run one program, and lie on the devices as its operands did.
    given = [*now, *seeds.values()]
    program, layouts = frame.once(
        (number, "body"),
        lambda: (
            flowing(scan.graph, now, scan.moving, seeds)
            if scan.moving
            else running(scan.graph, now),
            layouts_of(given),
        ),
    )
    given = [
        x if layout is None else jax.device_put(x, layout)
        for x, layout in zip(given, layouts, strict=True)
    ]
    now, then = given[: len(now)], given[len(now) :]
    seeds = dict(zip(seeds, then, strict=True))
    return frame_of(scan.graph, now, names, scan.moving, seeds, outer, program=program)


def turns_of(frame: Frame, number: int, watched: Callable[[list[Any]], Any]) -> Any:
    """How often a while loop's body runs, and the last turn that began with a sign.

    `watched` says of what is carried whether it shows the sign; -1 if it never did.
    """
    node = frame.node(number)

    def program(operands: Sequence[Any]) -> Any:
        goes_on, body, carry = _while_parts(node, operands)

        def turn(state: Any) -> Any:
            count, last, carry = state
            return count + 1, jnp.where(watched(carry), count, last), body(carry)

        state = (jnp.int32(0), jnp.int32(-1), carry)
        return lax.while_loop(lambda state: goes_on(state[2]), turn, state)[:2]

    operands = frame.operands(number)
    count, last = Program(program, None, operands)(operands)
    return int(count), int(last)


def _while_parts(node: Node, operands: Sequence[Any]) -> Any:
    params = node.eqn.params
    first = params["cond_nconsts"]
    then = first + params["body_nconsts"]
    tests, consts, carry = operands[:first], operands[first:then], operands[then:]
    test, body = graph_of(params["cond_jaxpr"]), graph_of(params["body_jaxpr"])

    def goes_on(carry: Sequence[Any]) -> Any:
        return run(test, [*tests, *carry])[test.results[0]]

    def step(carry: Sequence[Any]) -> list[Any]:
        values = run(body, [*consts, *carry])
        return [values[v] for v in body.results]

    return goes_on, step, list(carry)


def _turn(frame: Frame, number: int, index: int) -> Frame:
    node, operands = frame.node(number), frame.operands(number)
    total, _ = frame.once(
        (number, "turns"), lambda: turns_of(frame, number, lambda carry: False)
    )
    if not 0 <= index < total:
        raise IndexError(
            f"Step {number} is a while loop of {total} iterations; iteration {index} "
            "was asked for."
        )

    def program(operands: Sequence[Any], turns: Any) -> Any:
        _, body, carry = _while_parts(node, operands)
        return lax.fori_loop(0, turns, lambda _, carry: body(carry), carry)

    turns = jnp.int32(index)
    given = operands, turns
    carry = frame.once((number, "turn"), lambda: Program(program, None, *given))(*given)
    graph = frame.once(
        (number, "body"),
        lambda: graph_of(node.eqn.params["body_jaxpr"], (*node.callers, node.eqn)),
    )
    first = node.eqn.params["cond_nconsts"]
    then = first + node.eqn.params["body_nconsts"]
    names = [_outer_name(frame, v) for v in node.operands[first:then]]
    names += [f"carry[{k}]" for k in range(len(carry))]
    outer = Opening(frame, number, "iteration", index)
    now = [*operands[first:then], *carry]
    return frame_of(graph, now, names, outer=outer)


class Backward(NamedTuple):
    """What a node does in the backward pass.

    Attributes:
      frame: its equations, with values: from the node's operands and the cotangents of
        its outputs to those of its operands.
      operands: of which operands, in the order of the results.
      outputs: of which outputs, in the order of the inputs after the operands.
    """

    frame: Frame
    operands: tuple[int, ...]
    outputs: tuple[int, ...]

    def contribution(self, place: int) -> Any:
        """What it adds to the cotangent of an operand."""
        results = self.frame.graph.results
        return self.frame.values[results[self.operands.index(place)]]


def backward_of(frame: Frame, number: int) -> Backward | None:
    """The backward pass through one node, by its own rule; `None` if it has no part.

    Outputs that the loss doesn't depend on take no part: `eigvalsh` never asks for the
    slope of the eigenvectors, which may not exist.
    """
    return frame.once((number, "backward"), partial(_backward, frame, number))  # type: ignore[no-any-return]


def _backward(frame: Frame, number: int) -> Backward | None:
    node = frame.node(number)
    seeds = _seeds(frame, node)
    chosen = tuple(
        place
        for place, v in enumerate(node.operands)
        if v in frame.moves and frame.graph.inexact(v)
    )
    if not (seeds and chosen) or node.name in ("stop_gradient",):
        return None
    operands = frame.operands(number)

    def pulled(operands: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        def outputs(moved: list[Any]) -> list[Any]:
            inputs = list(operands)
            for place, value in zip(chosen, moved, strict=True):
                inputs[place] = value
            out = bind_with_lines(node.eqn, inputs)
            return [out[place] for place in seeds]

        _, pull = jax.vjp(outputs, [operands[place] for place in chosen])
        return list(pull(list(cotangents))[0])

    with jax.disable_jit(False):
        closed = jax.make_jaxpr(partial(call, pulled))(operands, list(seeds.values()))
    graph = graph_of(closed, (*node.callers, node.eqn))
    names = [_outer_name(frame, v) for v in node.operands]
    outer_names = [_outer_name(frame, node.outputs[place]) for place in seeds]
    names += [f"gradient of {name}" for name in outer_names]
    # Step by step: programs for each would have to be compiled, and XLA drops some NaN.
    with frame.by_steps():
        values = run(graph, [*operands, *seeds.values()])
    inner = Frame(
        graph, values, {}, tuple(names), (), Opening(frame, number, "backward")
    )
    return Backward(inner, chosen, tuple(seeds))
