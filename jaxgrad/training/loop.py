"""The compiled loop: gradient, update, records, and when to stop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrad.gradients import differentiate, jit_general
from jaxgrad.placing import keep, mesh_of, writes_one
from jaxgrad.pytrees import Loss, PyTree, combine, leaf_name, loss_and_aux
from jaxgrad.sgd import Schedule
from jaxgrad.training.results import TrainState
from jaxgrad.training.rows import Part
from jaxgrad.training.rules import update_rule

# Records kept on the device in one piece: 1 MiB.
_CAPACITY = 1 << 17
GO_ON, REACHED, LOSS = 0, -1, 1


class Settings(NamedTuple):
    """What a run's arguments say, as arrays: another value compiles nothing anew."""

    learning_rate: Any
    tolerance: Any
    record_every: Any
    shuffle_key: Any
    step_key: Any


class Loop(NamedTuple):
    """What goes round: `due` steps until the next record, and why to stop, if so."""

    state: TrainState
    due: Int[Array, ""]
    stop: Int[Array, ""]


class Records(NamedTuple):
    """Losses and gradient norms of the steps that were recorded."""

    losses: Float[Array, " capacity"]
    norms: Float[Array, " capacity"]
    filled: Int[Array, ""]


class Compiled(NamedTuple):
    """The optimizer's `init(params)`, and the compiled loops.

    `run` takes `(held, *args, (rows, layouts, settings, loop, until))` and steps on
    until a step, or a reason to stop; it gives the loop and the records. `once` takes
    `(held, *parts, (sizes, layouts, settings, loop))` and makes one step; it gives the
    loop, the loss and the gradient's norm.
    """

    init: Callable[[PyTree], PyTree]
    run: Callable[..., tuple[Loop, Records]]
    once: Callable[..., tuple[Loop, Any, Any]]


def compile_loop(
    get_loss: Callable[[], Loss],
    has_aux: bool,
    schedule: Schedule | None,
    optimizer: Any,
) -> Compiled:
    """The loops of a loss with an update rule; each compiles when it's called."""
    init, update = update_rule(schedule, optimizer)

    def step(
        held: PyTree,
        parts: Sequence[Part],
        layouts: tuple[Any, ...],
        settings: Settings,
        loop: Loop,
    ) -> tuple[Loop, Any, Any]:
        old = loop.state
        key = settings.step_key
        key = None if key is None else jax.random.fold_in(key, old.step)

        def value_and_grad(trained: PyTree) -> tuple[Any, PyTree]:
            params, args = combine(trained, held), tuple(part.args for part in parts)
            if key is None and len(parts) == 1:
                got = differentiate(get_loss(), params, args[0], has_aux)
            else:
                sizes = [part.size for part in parts]
                whole = _weighted(get_loss(), has_aux, sizes, key)
                got = differentiate(whole, params, args, False)
            return got[0], got[2]

        value, gradient = value_and_grad(old.params)
        if any(layouts) and writes_one(jax.make_jaxpr(value_and_grad)(old.params)):
            mine = layouts[1 : 1 + len(jax.tree.leaves(old.params))]  # after the step's
            gradient = keep(gradient, mine, apart=True)
        params, optimizer = update(
            old.params,
            gradient,
            old.optimizer,
            settings.learning_rate,
            value,
            lambda trained: value_and_grad(trained)[0],
        )
        stop = _stop(value, gradient, params, settings.tolerance)
        stop = jnp.where(loop.stop == GO_ON, stop, loop.stop)  # once is for good
        new = old._replace(step=old.step + 1, params=params, optimizer=optimizer)
        kept = jax.tree.map(
            lambda n, o: o if n is o else jnp.where(stop == GO_ON, n, o), new, old
        )
        now = loop.due == 0
        due = jnp.where(now, settings.record_every, loop.due) - 1
        return Loop(keep(kept, layouts), due, stop), value, _norm(gradient)

    def run(operands: tuple[Any, ...]) -> tuple[Loop, Records]:
        held, *args, (rows, layouts, settings, first, until) = operands
        make = functools.partial(step, held, layouts=layouts, settings=settings)

        def of(size: int | None) -> Callable[[Any], Any]:
            """A step on a batch of so many rows; on all of args, if `None`."""

            def recorded(carry: tuple[Loop, Records]) -> tuple[Loop, Records]:
                loop, records = carry
                parts = [Part(1, tuple(args))]
                if size is not None:
                    place = loop.state.step
                    parts = rows.batch(tuple(args), place, size, settings.shuffle_key)
                after, value, norm = make(parts, loop=loop)
                # What isn't due goes to a slot past the end, where nobody looks.
                now = loop.due == 0
                slot = jnp.where(now, records.filled, _CAPACITY)
                return after, Records(
                    losses=_put(records.losses, slot, value),
                    norms=_put(records.norms, slot, norm),
                    filled=records.filled + now,
                )

            return recorded

        def going(carry: tuple[Loop, Records]) -> Any:
            loop, records = carry
            return (
                (loop.state.step < until)
                & (loop.stop == GO_ON)
                & (records.filled < _CAPACITY)
            )

        def epoch(carry: tuple[Loop, Records]) -> tuple[Loop, Records]:
            def full(carry: tuple[Loop, Records]) -> Any:
                return rows.place(carry[0].state.step) < rows.full

            carry = jax.lax.while_loop(
                lambda c: going(c) & full(c), of(rows.batch_size), carry
            )
            last = going(carry) & ~full(carry)
            return jax.lax.cond(  # type: ignore[no-any-return]
                last, of(rows.short), lambda carry: carry, carry
            )

        with mesh_of((first.state, args)):
            empty = jnp.zeros(_CAPACITY + 1, float)
            begin = first, Records(empty, empty, jnp.zeros((), jnp.int32))
            if rows is not None and rows.short:
                return jax.lax.while_loop(going, epoch, begin)
            size = None if rows is None else rows.batch_size
            return jax.lax.while_loop(going, of(size), begin)

    def once(operands: tuple[Any, ...]) -> tuple[Loop, Any, Any]:
        held, *batches, (sizes, layouts, settings, loop) = operands
        parts = list(map(Part, sizes, batches))
        with mesh_of((loop.state, batches)):
            return step(held, parts, layouts, settings, loop)

    return Compiled(init, jit_general(run), jit_general(once))


def _weighted(
    loss: Loss, has_aux: bool, sizes: Sequence[int], key: Any
) -> Callable[..., Any]:
    """The loss of rows that come in parts, as a mean over rows is: weighted by size.

    The loss is given the step's key, folded with the part's number from the second on.
    """

    def whole(params: PyTree, *parts: tuple[Any, ...]) -> Any:
        total: Any = 0.0
        for place, (size, args) in enumerate(zip(sizes, parts, strict=True)):
            keyword = {}
            if key is not None:
                own = jax.random.fold_in(key, place) if place else key
                keyword = {"key": own}
            value, _ = loss_and_aux(loss, loss(params, *args, **keyword), has_aux)
            if len(sizes) == 1:
                return value
            total = total + size / sum(sizes) * value
        return total

    return whole


def _put(buffer: Array, slot: Array, value: Any) -> Array:
    # Twice as fast in this loop as buffer.at[slot].set(value), which checks the slot.
    value = jnp.asarray(value, buffer.dtype)
    return jax.lax.dynamic_update_index_in_dim(  # type: ignore[no-any-return]
        buffer, value, slot, 0
    )


def _norm(gradient: PyTree) -> Any:
    """The 2-norm over all leaves, summed in float32 or wider."""
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
        for leaf in jax.tree.leaves(gradient)
    ]
    return jnp.sqrt(sum(squares))


def _stop(value: Any, gradient: PyTree, params: PyTree, tolerance: Any) -> Any:
    """0 to go on; -1 if the loss is small enough; else 1 + the first that isn't finite.

    They are counted: the loss, each leaf of the gradient, each leaf of the parameters.
    """
    leaves = [value, *jax.tree.leaves(gradient), *jax.tree.leaves(params)]
    bad: Any = GO_ON
    for place in reversed(range(len(leaves))):
        finite = jnp.all(jnp.isfinite(leaves[place]))
        bad = jnp.where(finite, bad, 1 + place)
    reached = jnp.isfinite(value) & (value < tolerance)
    return jnp.where(reached, REACHED, bad).astype(jnp.int32)


def reason(loop: Loop, trained: PyTree, tolerance: float | None) -> str | None:
    """Why a loop has stopped by itself, in words; `None` if it hasn't."""
    stop, step = int(loop.stop), int(loop.state.step)
    if stop == GO_ON:
        return None
    if stop == REACHED:
        return f"tolerance: the loss is under {tolerance:g} before update {step}"
    if stop == LOSS:
        return f"non-finite loss before update {step}"
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    where = stop - LOSS - 1
    name = leaf_name(paths[where % len(paths)])
    if where < len(paths):
        return f"non-finite gradient of leaf `{name}` before update {step}"
    return f"non-finite parameter: update {step} would spoil leaf `{name}`"
