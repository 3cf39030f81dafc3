"""Follows a number that isn't finite back to the step that made the first of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.equations import bind
from jaxgrad.flow.frames import Frame
from jaxgrad.flow.opening import backward_of, forward_of, opens, scan_of, turns_of
from jaxgrad.flow.spread import (
    Index,
    at_hand,
    between,
    nth,
    only,
    pick,
    picked,
    placed,
    space,
)
from jaxgrad.placing import layout_of


class Entry(NamedTuple):
    """One number: an entry of a variable of a frame."""

    frame: Frame
    variable: int
    at: Index

    @property
    def value(self) -> Any:
        """The number."""
        return pick(self.frame.values[self.variable], self.at)


class Found(NamedTuple):
    """Where the first of the numbers that aren't finite comes from.

    Attributes:
      entry: the number: an input, a constant, or what a step made.
      node: the step that made it of finite numbers; of an input or a constant the first
        step that uses it.
      given: whether it's an input or a constant.
      born: where infinities became the NaN that was followed, if they did: the NaN, and
        the node that made it.
    """

    entry: Entry
    node: int
    given: bool
    born: tuple[Entry, int] | None


def origin_of_value(frame: Frame, variable: int, index: Index) -> Found:
    """Follows the value of an entry back."""
    born: tuple[Entry, int] | None = None
    entry, used = Entry(frame, variable, index), 0
    while True:
        frame, variable, index = entry
        made = frame.graph.maker.get(variable)
        if made is None:
            before = _outside(entry)
            if before is None:
                return Found(entry, used, True, born)
            if isinstance(before, _Gradient):
                found = origin_of_gradient(*before)
                return found._replace(born=found.born or born)
            if frame.outer is not None:
                used = frame.outer.number
            entry = before
            continue
        used, place = made
        if opens(frame.node(used)):
            entry = _inside(frame, used, place, index)
            continue
        entry_or_none, joint = _culprit(frame, used, place, index)
        if entry_or_none is None:
            return Found(entry, used, False, born)
        if joint:
            born = (entry, used)
        entry = entry_or_none


class _Gradient(NamedTuple):
    """The cotangent of an entry, as what to follow next."""

    frame: Frame
    variable: int
    at: Index


def origin_of_gradient(frame: Frame, variable: int, index: Index) -> Found:
    """Follows the cotangent of an entry back."""
    while True:
        after = _contribution(frame, variable, index)
        if isinstance(after, Entry):
            return origin_of_value(*after)
        if isinstance(after, Found):
            return after
        frame, variable, index = after


def bad(value: Any) -> bool:
    """Whether a number is infinite or NaN."""
    return not bool(np.isfinite(value))


def _inside(frame: Frame, number: int, place: int, index: Index) -> Entry:
    """An output of a step that opens, as an entry of what is inside of it."""
    node = frame.node(number)
    if node.name == "scan":
        scan = scan_of(frame, number)
        count = scan.counts[1]
        if place >= count:
            inner = forward_of(frame, number, index[0])
            return Entry(inner, inner.graph.results[place], index[1:])
        # The last iteration that still began with a finite number there.
        began = pick(scan.carries[place], index)
        since = [row for row in scan.order if not bad(began[row])]
        if not since:
            start = node.operands[scan.counts[0] + place]
            return Entry(frame, start, index)
        inner = forward_of(frame, number, since[-1])
        return Entry(inner, inner.graph.results[place], index)
    if node.name == "while":
        skipped = node.eqn.params["cond_nconsts"] + node.eqn.params["body_nconsts"]
        _, last = turns_of(
            frame, number, lambda carry: jnp.isfinite(picked(carry[place], index))
        )
        if last < 0:
            return Entry(frame, node.operands[skipped + place], index)
        inner = forward_of(frame, number, last)
        return Entry(inner, inner.graph.results[place], index)
    inner = forward_of(frame, number)
    return Entry(inner, inner.graph.results[place], index)


def _outside(entry: Entry) -> Entry | _Gradient | None:
    """An input of an inner frame, as what it is outside; `None` if it's given."""
    frame, variable, index = entry
    outer = frame.outer
    if outer is None or variable >= frame.graph.inputs:
        return None
    node = outer.frame.node(outer.number)
    if outer.kind == "backward":
        count = len(node.operands)
        if variable < count:
            return Entry(outer.frame, node.operands[variable], index)
        backward = backward_of(outer.frame, outer.number)
        assert backward is not None
        output = node.outputs[backward.outputs[variable - count]]
        return _Gradient(outer.frame, output, index)
    if outer.kind == "branch":
        return Entry(outer.frame, node.operands[variable + 1], index)
    if outer.kind == "forward":
        return Entry(outer.frame, node.operands[variable], index)
    if node.name == "while":
        skipped = node.eqn.params["cond_nconsts"]
        consts = node.eqn.params["body_nconsts"]
        if variable < consts:
            return Entry(outer.frame, node.operands[skipped + variable], index)
        return _earlier(
            outer.frame, outer.number, outer.place, variable - consts, index
        )
    first, count, _ = scan_of(outer.frame, outer.number).counts
    if variable < first:
        return Entry(outer.frame, node.operands[variable], index)
    if variable >= first + count:
        return Entry(outer.frame, node.operands[variable], (outer.place, *index))
    return _earlier(outer.frame, outer.number, outer.place, variable - first, index)


def _earlier(frame: Frame, number: int, row: int, place: int, index: Index) -> Entry:
    """What an iteration was given in its carry, as what another one made."""
    node = frame.node(number)
    if node.name == "while":
        skipped = node.eqn.params["cond_nconsts"] + node.eqn.params["body_nconsts"]
        before = row - 1
    else:
        scan = scan_of(frame, number)
        skipped = scan.counts[0]
        turn = scan.order.index(row)
        before = scan.order[turn - 1] if turn else -1
    if before < 0:
        return Entry(frame, node.operands[skipped + place], index)
    inner = forward_of(frame, number, before)
    return Entry(inner, inner.graph.results[place], index)


def _contribution(
    frame: Frame, variable: int, index: Index
) -> Entry | Found | _Gradient:
    """What makes the cotangent of an entry bad: one use of the variable, or their sum.

    The backward pass goes through the last use first.
    """
    last = None
    for number in reversed(frame.graph.users.get(variable, ())):
        node = frame.node(number)
        last = number if last is None else last
        for place, operand in enumerate(node.operands):
            if operand != variable:
                continue
            follow = _through(frame, number, place, index)
            if follow is not None:
                return follow
    outer = frame.outer
    if outer is not None and variable in frame.graph.results:
        after = _beyond(frame, frame.graph.results.index(variable), index)
        if after is not None:
            return after
    # Finite numbers whose sum isn't.
    assert last is not None
    return Found(Entry(frame, variable, index), last, False, None)


def _through(
    frame: Frame, number: int, place: int, index: Index
) -> Entry | _Gradient | None:
    """What a node adds to the cotangent of an entry, if that is bad."""
    node = frame.node(number)
    if node.name == "scan":
        scan = scan_of(frame, number)
        first, count, _ = scan.counts
        if not scan.order:
            return None
        if place >= first + count:
            rows, inner_index = [index[0]], index[1:]
        elif place >= first:
            rows, inner_index = [scan.order[0]], index
        else:
            rows, inner_index = list(reversed(scan.order)), index
        for row in rows:
            inner = forward_of(frame, number, row)
            if place in inner.cotangents and bad(
                pick(inner.cotangents[place], inner_index)
            ):
                return _Gradient(inner, place, inner_index)
        return None
    if node.name == "cond":
        inner = forward_of(frame, number)
        cotangent = inner.cotangents.get(place - 1)
        if cotangent is None or not bad(pick(cotangent, index)):
            return None
        return _Gradient(inner, place - 1, index)
    backward = backward_of(frame, number)
    if backward is None or place not in backward.operands:
        return None
    if not bad(pick(backward.contribution(place), index)):
        return None
    graph = backward.frame.graph
    result = graph.results[backward.operands.index(place)]
    return Entry(backward.frame, result, index)


def _beyond(frame: Frame, place: int, index: Index) -> _Gradient | None:
    """The cotangent that a result of an inner frame was given, if that is bad."""
    outer = frame.outer
    assert outer is not None
    node = outer.frame.node(outer.number)
    if outer.kind == "branch":
        variable = node.outputs[place]
    elif node.name == "scan":
        scan = scan_of(outer.frame, outer.number)
        if place >= scan.counts[1]:
            variable, index = node.outputs[place], (outer.place, *index)
        else:
            turn = scan.order.index(outer.place) + 1
            if turn < len(scan.order):
                inner = forward_of(outer.frame, outer.number, scan.order[turn])
                variable = scan.counts[0] + place
                if not bad(pick(inner.cotangents[variable], index)):
                    return None
                return _Gradient(inner, variable, index)
            variable = node.outputs[place]
    else:
        return None
    cotangent = outer.frame.cotangents.get(variable)
    if cotangent is None or not bad(pick(cotangent, index)):
        return None
    return _Gradient(outer.frame, variable, index)


def _culprit(
    frame: Frame, number: int, place: int, index: Index
) -> tuple[Entry | None, bool]:
    """The entry of a node's inputs that makes an entry of its output bad.

    Found by trying: with the other bad entries replaced by 1, is the output still bad?
    `None` if it is so with all of them replaced: then the node itself made it. The
    second says if it takes more than one, or makes NaN of infinities.
    """
    node = frame.node(number)
    operands = [at_hand(x) if _real(x) else x for x in frame.operands(number)]
    target = pick(frame.values[node.outputs[place]], index)
    wants_nan = bool(np.isnan(target))
    masks = {k: ~space(x).isfinite(x) for k, x in enumerate(operands) if _real(x)}
    masks = {k: mask for k, mask in masks.items() if mask.any()}
    if not masks:
        return None, False

    def still_bad(kept: _Chosen) -> bool:
        inputs = list(operands)
        for k, mask in masks.items():
            # 1 is in every function's domain, and no one's pole.
            one, xp = np.ones((), operands[k].dtype), space(mask)
            kept_here = kept.get(k, np.zeros((), bool))
            array = xp.where(mask & ~kept_here, one, operands[k])
            inputs[k] = array
        for k, x in enumerate(frame.operands(number)):
            if layout_of(x) is not None and _real(x):
                inputs[k] = placed(inputs[k], x)
        with frame.by_steps():
            out = pick(bind(node.eqn, inputs)[place], index)
        return bool(np.isnan(out)) if wants_nan else bad(out)

    if still_bad({}):
        return None, False
    shape = frame.graph.avals[node.outputs[place]].shape
    same: _Chosen = {}
    for k, mask in masks.items():
        if np.shape(mask) in (shape, ()):
            same[k] = only(mask, index) if np.shape(mask) else mask
    nans = {k: space(operands[k]).isnan(operands[k]) for k in masks}
    tried = [{k: mask & nans[k] for k, mask in same.items()}]
    tried += [nans, same] if wants_nan else [same]
    chosen = next((t for t in tried if _any(t) and still_bad(t)), masks)
    (k, at), joint = _narrow(chosen, still_bad)
    made_nan = wants_nan and not np.isnan(pick(operands[k], at))
    return Entry(frame, node.operands[k], at), made_nan or (joint and wants_nan)


_Chosen = dict[int, Any]
"""Some entries of a node's inputs: a mask per input."""


def _any(chosen: _Chosen) -> bool:
    return any(bool(mask.any()) for mask in chosen.values())


def _real(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def _narrow(
    chosen: _Chosen, still_bad: Callable[[_Chosen], bool]
) -> tuple[tuple[int, Index], bool]:
    """One of the entries that is enough, or of several that only are so together."""
    counts = {k: int(mask.sum()) for k, mask in chosen.items()}

    def part(*ranges: tuple[int, int]) -> _Chosen:
        found, first = {}, 0
        for k, mask in chosen.items():
            parts = [between(mask, a - first, b - first) for a, b in ranges]
            found[k] = functools.reduce(operator.or_, parts)
            first += counts[k]
        return found

    context: list[tuple[int, int]] = []
    start, stop, joint = 0, sum(counts.values()), False
    while stop - start > 1:
        middle = (start + stop) // 2
        if still_bad(part(*context, (start, middle))):
            stop = middle
        elif still_bad(part(*context, (middle, stop))):
            start = middle
        else:
            joint = True
            context.append((middle, stop))
            stop = middle
    for k, mask in chosen.items():
        if start < counts[k]:
            return (k, nth(mask, start)), joint
        start -= counts[k]
    raise AssertionError("an entry is left")
