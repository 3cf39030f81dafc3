"""Where the gradient of a leaf dies: the steps that let nothing of it through."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.compiling import Program, shaped
from jaxgrad.equations import FLAT, Node, frames_of, in_library, run
from jaxgrad.flow.frames import Frame
from jaxgrad.flow.opening import forward_of, scan_of
from jaxgrad.flow.passing import (
    EXPLAINED,
    Reached,
    Reason,
    all_of,
    contributes,
    dependent,
    is_blind,
    nonzero,
    reason_of,
)
from jaxgrad.flow.places import Spot, spot_of
from jaxgrad.flow.spread import at_hand
from jaxgrad.placing import keep, numbers_of


@dataclass(frozen=True)
class Block(Spot):
    """A step that stops the gradient of a leaf.

    Attributes:
      reason: a fixed word.
    """

    reason: Reason

    @property
    def why(self) -> str:
        """The reason, for a person."""
        return f"`{self.operation}` {EXPLAINED[self.reason]}"


class _Blocked(NamedTuple):
    frame: Frame
    number: int
    reason: Reason


def blocks_of(frame: Frame, leaf: int) -> tuple[Block, ...]:
    """The steps that stop a leaf's gradient if it's all zero; none if it's unused."""
    start = {leaf: all_of(frame.graph.avals[leaf].shape)}
    found = list(_walk(frame, start))
    blocks: list[Block] = []
    # Where nothing else stops it, what is beside the point is the point.
    kept = [b for b in found if not _aside(b)] or found
    lowest = any(b.reason in _SOFT for b in kept) and _at_minimum(frame, leaf)
    for inner, number, reason in kept:
        if reason in _SOFT and lowest:
            reason = "at a minimum"
        elif reason == "at a minimum":
            reason = "stationary"
        block = Block(**vars(spot_of(inner, number)), reason=reason)
        if not any((b.line, b.reason) == (block.line, reason) for b in blocks):
            blocks.append(block)
    lines = {b.line for b in blocks if b.reason != "discarded"}
    return tuple(b for b in blocks if b.reason != "discarded" or b.line not in lines)


# What a minimum can look like, step by step.
_SOFT = ("at a minimum", "cancellation", "zero factor", "saturation", "maximum's loser")

# How far a leaf is moved, as a share of its size, to see if the loss rises. The rise
# must be seen in float32: a share h of the size changes the loss by h**2 of it.
_SHARES = (0.1, 0.01)
_DIRECTIONS = 3


def _at_minimum(frame: Frame, leaf: int) -> bool:
    """Whether the loss rises along random directions of a leaf, on both sides."""
    graph, value = frame.graph, frame.values[leaf]
    loss = graph.results[0]
    inputs = list(frame.values[: graph.inputs])
    move = _moving(jax.typeof(value), value.sharding)
    program = frame.once(
        "loss", lambda: Program(lambda given: run(graph, given)[loss], None, inputs)
    )

    def at(way: int, share: float) -> float:
        moved = move(value, jnp.uint32(way), jnp.float32(share))
        return float(program([*inputs[:leaf], moved, *inputs[leaf + 1 :]]))

    now = at(0, 0.0)
    # A loss adds up its terms in an order that a step may change: a few roundings.
    now += 8 * float(np.spacing(np.float32(abs(now))))
    return any(
        all(at(way, by) > now for way in range(_DIRECTIONS) for by in (-share, share))
        for share in _SHARES
    )


@functools.cache
def _moving(aval: Any, sharding: Any) -> Program:
    """Compiles a move of an array along a random direction, by a share of its size."""
    like = shaped(aval.shape, aval.dtype, sharding)
    wide = jnp.promote_types(aval.dtype, jnp.float32)

    def moved(value: Any, way: Any, share: Any) -> Any:
        here = value.astype(wide)
        size = jnp.max(jnp.abs(here), initial=0)
        signs = jax.random.rademacher(jax.random.key(way), aval.shape, wide)
        there = here + share.astype(wide) * jnp.where(size > 0, size, 1) * signs
        return keep([there.astype(value.dtype)], layouts)[0]

    layouts = (sharding if sharding.num_devices > 1 else None,)
    size = int(np.prod(aval.shape))
    return Program(moved, size, like, jnp.uint32(0), jnp.float32(0))


def _walk(frame: Frame, reached: Reached) -> Iterator[_Blocked]:
    """Goes forward from what depends on the leaf to the steps that stop it.

    `reached` gets all variables that depend on the leaf and have the cotangent zero.
    """
    graph = frame.graph
    alive: dict[int, list[int]] = {}
    for number, node in enumerate(graph.nodes):
        places = [p for p, v in enumerate(node.operands) if v in reached]
        places = [p for p in places if reached[node.operands[p]].any()]
        if not places:
            continue
        if not any(v in graph.needed for v in node.outputs):
            if not any(v in graph.users for v in node.outputs):
                yield _Blocked(frame, number, "discarded")
            for v in node.outputs:
                if graph.inexact(v):
                    reached[v] = all_of(graph.avals[v].shape)
            continue
        stopped = _stops(frame, node)
        if stopped:
            yield _Blocked(frame, number, stopped)
            continue
        after = dependent(frame, number, places, reached)
        arriving = {
            v: nonzero(frame.cotangents.get(v)) & mask for v, mask in after.items()
        }
        if node.name == "select_n" and _untaken(frame, node, places, reached):
            yield _Blocked(frame, number, "branch not taken")
        elif not any(mask.any() for mask in after.values()):
            if node.name == "select_n":
                yield _Blocked(frame, number, "branch not taken")
                continue
            yield _Blocked(frame, number, "discarded")
        blind = [p for p in places if is_blind(frame, number, p, reached)]
        if blind and not any(mask.any() for mask in arriving.values()):
            # Nothing arrives, and nothing would get through.
            yield _Blocked(frame, number, reason_of(frame, number, blind[0], reached))
            continue
        if not any(mask.any() for mask in arriving.values()):
            for v, mask in after.items():
                reached[v] = reached.get(v, False) | mask
            continue
        if node.name == "scan":
            yield from _through_scan(frame, number, places, reached)
            continue
        if node.name == "cond":
            yield from _through_cond(frame, number, places, reached)
            continue
        for place in places:
            if contributes(frame, number, place, reached[node.operands[place]]):
                alive.setdefault(node.operands[place], []).append(number)
            elif node.name != "select_n":
                yield _Blocked(frame, number, reason_of(frame, number, place, reached))
    for numbers in alive.values():
        yield _Blocked(frame, _meeting(frame, numbers), "cancellation")


def _stops(frame: Frame, node: Node) -> Reason | None:
    """Whether a step has no slope, whatever its numbers."""
    if node.name == "stop_gradient":
        return "stop_gradient"
    if node.name in FLAT:
        return "rounding"
    floats = [v for v in node.outputs if frame.graph.inexact(v)]
    if any(v in frame.graph.needed for v in floats):
        return None
    if node.name in ("argmax", "argmin", "sort", "top_k", "approx_top_k"):
        return "argmax"
    casts = ("convert_element_type", "bitcast_convert_type")
    return "integer cast" if node.name in casts else "comparison"


def _aside(blocked: _Blocked) -> bool:
    """Whether a block beside others isn't what stops the gradient.

    A test that only chooses between branches; what a library holds still, compares or
    drops inside of a function, as softmax does its maximum.
    """
    if blocked.reason == "comparison" and _chooses(blocked):
        return True
    if blocked.reason not in ("stop_gradient", "comparison", "discarded"):
        return False
    for eqn in blocked.frame.node(blocked.number).lines:
        for place in frames_of(eqn):
            if not in_library(place.file):
                return False
            if _COMPOSED.search(place.file.replace(os.sep, "/")):
                return True
    return False


# Functions of many steps; the rest of jax is what a user writes step by step.
_COMPOSED = re.compile(
    r"/jax/_src/(nn|ops|scipy|lax/control_flow)/|/(optax|flax|equinox)/"
)


def _chooses(blocked: _Blocked) -> bool:
    """Whether the result of a comparison is used only to choose between branches."""
    graph = blocked.frame.graph
    tests = list(blocked.frame.node(blocked.number).outputs)
    for test in tests:
        for number in graph.users.get(test, ()):
            node = graph.nodes[number]
            if node.name == "select_n" and node.operands[0] == test:
                continue
            if any(graph.inexact(v) for v in node.outputs):
                return False
            tests += [v for v in node.outputs if v not in tests]
    return True


def _untaken(frame: Frame, node: Node, places: list[int], reached: Reached) -> bool:
    """Whether a `where` takes the other branch at an entry that has a gradient."""
    slope = nonzero(frame.cotangents.get(node.outputs[0]))
    which = at_hand(frame.values[node.operands[0]]).astype(int)
    return any(
        bool((slope & reached[node.operands[p]] & (which != p - 1)).any())
        for p in places
    )


def _meeting(frame: Frame, numbers: list[int]) -> int:
    """The first step that depends on all of the steps."""
    graph = frame.graph
    meeting = None
    for number in dict.fromkeys(numbers):
        reach = graph.moved_by(graph.nodes[number].outputs, smoothly=True)
        after = {
            n
            for n, node in enumerate(graph.nodes)
            if n == number or any(v in reach for v in node.operands)
        }
        meeting = after if meeting is None else meeting & after
    return min(meeting or set(numbers))


def _through_cond(
    frame: Frame, number: int, places: list[int], reached: Reached
) -> Iterator[_Blocked]:
    inner = forward_of(frame, number)
    start = {p - 1: reached[frame.node(number).operands[p]] for p in places if p}
    used = {v for v in start if v in inner.graph.users or v in inner.graph.results}
    if not used:
        yield _Blocked(frame, number, "branch not taken")
    yield from _walk(inner, dict(start))


# Rows of a scan that are looked into: enough for what dies in every one of them.
_ROWS = 2048


def _through_scan(
    frame: Frame, number: int, places: list[int], reached: Reached
) -> Iterator[_Blocked]:
    node, scan = frame.node(number), scan_of(frame, number)
    first, count, _ = scan.counts
    blocked = False
    carried: Reached = {
        p: reached[node.operands[p]] for p in places if first <= p < first + count
    }
    for row in scan.order[:_ROWS]:
        inner = forward_of(frame, number, row)
        start = dict(carried)
        for p in places:
            mask = reached[node.operands[p]]
            if p < first:
                start[p] = mask
            elif p >= first + count:
                start[p] = mask[row]
        for found in _walk(inner, start):
            blocked = True
            yield found
        results = inner.graph.results[:count]
        carried = {first + k: start[v] for k, v in enumerate(results) if v in start}
    if not blocked and len(scan.order) <= _ROWS:
        yield _Blocked(frame, number, "discarded")


class DeadEntries(NamedTuple):
    """Zeros in the gradient of a leaf that isn't all zero.

    Attributes:
      entries: how many entries are zero.
      size: how many there are.
      slices: per axis, the places where the whole slice is zero: the rows of an
        embedding that were not looked up, the units that are dead.
    """

    entries: int
    size: int
    slices: tuple[tuple[int, ...], ...]


def dead_entries_of(gradient: Any) -> DeadEntries:
    """The zeros of a gradient."""
    zero = at_hand(gradient) == 0
    slices = []
    for axis in range(zero.ndim):
        rest = tuple(a for a in range(zero.ndim) if a != axis)
        whole = zero.all(axis=rest)
        slices.append(tuple(int(i) for i in np.flatnonzero(numbers_of(whole))))
    return DeadEntries(int(zero.sum()), int(zero.size), tuple(slices))
