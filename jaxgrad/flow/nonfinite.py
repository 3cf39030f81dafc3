"""All origins of numbers that aren't finite, and which comes first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad.flow.frames import Frame
from jaxgrad.flow.opening import backward_of
from jaxgrad.flow.origins import Found, origin_of_gradient, origin_of_value
from jaxgrad.flow.reasons import Origin, explain
from jaxgrad.flow.spread import at_hand, nth, space
from jaxgrad.flow.summaries import is_number


def first_nonfinite(frame: Frame) -> Origin | None:
    """The origin of what is bad in the loss or its gradient, the first if several.

    Where both are finite, that of a NaN in between.
    """
    loss = frame.graph.results[0]
    if _count(frame, frame.values[loss]):
        return explain(origin_of_value(frame, loss, ()), harmless=False)
    leaves = [v for v in frame.moving if _count(frame, frame.cotangents[v])]
    found = [origin_of_gradient(frame, v, _where(frame.cotangents[v])) for v in leaves]
    if found:
        return min((explain(f, harmless=False) for f in found), key=_order)
    births = _births(frame, nan=True)
    born = [explain(f, harmless=True) for f in births if f.born or not f.given]
    return min(born, key=_order, default=None) or _folded(frame)


def _folded(frame: Frame) -> Origin | None:
    """The origin of a NaN that the compiled program drops and single steps don't.

    XLA makes a choice of a product with a mask: its 0 times infinity is 0. JAX without
    `jit` gives NaN.
    """
    for number in reversed(range(len(frame.graph.nodes))):
        node = frame.node(number)
        if not any(_count(frame, frame.cotangents.get(v)) for v in node.outputs):
            continue
        backward = backward_of(frame, number)
        for place in backward.operands if backward else ():
            ours = frame.cotangents.get(node.operands[place])
            if backward is None or ours is None or _count(frame, ours, nan=True):
                continue
            single = backward.contribution(place)
            single = at_hand(single)
            if not space(single).isnan(single).any():
                continue
            graph = backward.frame.graph
            result = graph.results[backward.operands.index(place)]
            found = origin_of_value(backward.frame, result, _where(single))
            origin = explain(found, harmless=True)
            more = (
                " XLA's compiled program drops it; without `jit` the gradient is NaN."
            )
            return replace(origin, reason=origin.reason + more)
    return None


def all_nonfinite(frame: Frame) -> tuple[Origin, ...]:
    """Every origin, infinities that do no harm among them, in order."""
    first = first_nonfinite(frame)
    harmless = first is None or first.harmless
    births = [explain(f, harmless=harmless) for f in _births(frame, nan=False)]
    every = [*([first] if first else []), *births]
    unique = {_key(origin): origin for origin in reversed(every)}
    return tuple(sorted(unique.values(), key=_order))


def _order(origin: Origin) -> tuple[int, int]:
    """As the program runs: forward through the steps, then backward."""
    if origin.phase == "forward":
        return 0, origin.number
    return 1, -origin.number


def _key(origin: Origin) -> tuple[Any, ...]:
    return origin.number, origin.phase, origin.file, origin.line, origin.kind


def _count(frame: Frame, value: Any, *, nan: bool = False) -> int:
    """How many entries aren't finite, or are NaN."""
    if value is None or not is_number(value.dtype) or not np.size(value):
        return 0
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return 0
    summary = frame.summary(value)
    return summary.nan if nan else summary.nonfinite


def _where(value: Any) -> tuple[int, ...]:
    """The first entry that is NaN, or else infinite."""
    array = at_hand(value)
    mask = space(array).isnan(array)
    return nth(mask if mask.any() else ~space(array).isfinite(array))


def _births(frame: Frame, *, nan: bool) -> Iterator[Found]:
    """The first of the values and cotangents that aren't finite, or are NaN."""
    graph = frame.graph
    bad = {
        v
        for v in range(len(graph.avals))
        if v in graph.needed or v in graph.maker
        if _count(frame, frame.values[v], nan=nan)
    }
    for variable in sorted(bad):
        made = graph.maker.get(variable)
        before: Sequence[int] = graph.nodes[made[0]].operands if made else ()
        if not bad & set(before):
            yield origin_of_value(frame, variable, _where(frame.values[variable]))
    sick = {v for v, ct in frame.cotangents.items() if _count(frame, ct, nan=nan)}
    for variable in sorted(sick, reverse=True):
        users = [graph.nodes[n] for n in graph.users.get(variable, ())]
        after = {v for node in users for v in node.outputs}
        used = {v for node in users for v in (*node.operands, *node.outputs)}
        if not after & sick and not used & bad:
            where = _where(frame.cotangents[variable])
            yield origin_of_gradient(frame, variable, where)
