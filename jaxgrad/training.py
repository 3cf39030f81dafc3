"""Training: one compiled loop of gradient and update, that can be stopped and go on."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxgrad.gradients import differentiate, jit_general, once_per_loss
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    as_params,
    combine,
    leaf_name,
    partition,
    split_static,
)
from jaxgrad.sgd import Schedule, check_number, init_sgd, sgd_update
from jaxgrad.tables import Report, Table, number


class TrainState(NamedTuple):
    """All that a run needs to go on: a pytree of arrays, to be saved as any other.

    Attributes:
      step: how many updates were made since the first run began.
      params: the trained leaves, with `None` for those that are static or fixed.
      optimizer: the state of `sgd_update`, or of the optax transformation.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult(Report):
    """What a run of `train` did.

    Attributes:
      params: the parameters after the last update, static leaves included.
      losses: `losses[k]` is the loss before update `k * record_every`. A run that
        stopped early has looked at the loss of the `params` it returns: where that
        step is one of those recorded, it is one more entry, the last.
      gradient_norms: the 2-norm of the whole gradient, at the same steps.
      steps: how many updates this run made.
      stopped: `None` if all steps were made; else why not: a sentence that begins with
        `tolerance`, `non-finite loss`, `non-finite gradient`, `non-finite parameter`
        or `interrupted`.
      state: give it to `train` to go on.
    """

    params: PyTree
    losses: Float[np.ndarray, " records"]
    gradient_norms: Float[np.ndarray, " records"]
    steps: int
    stopped: str | None
    state: TrainState

    def tables(self) -> list[Table]:
        """Steps, losses and gradient norms, first and last."""
        rows = [["updates made", str(self.steps)]]
        if self.losses.size:
            rows += [
                ["first loss", number(self.losses[0])],
                ["last recorded loss", number(self.losses[-1])],
                ["first gradient norm", number(self.gradient_norms[0])],
                ["last recorded gradient norm", number(self.gradient_norms[-1])],
            ]
        rows.append(["stopped", self.stopped or "no: all steps were made"])
        return [Table("Training", ["", ">value"], rows)]


def train(
    loss: Loss,
    params: PyTree,
    *args: Any,
    steps: int,
    learning_rate: float | Float[ArrayLike, ""] | Schedule | None = None,
    optimizer: Any = None,
    tolerance: float | None = None,
    record_every: int = 1,
    state: TrainState | None = None,
    has_aux: bool = False,
    progress: bool | None = None,
) -> TrainResult:
    r"""Trains parameters by full-batch gradient descent, in one compiled loop.

    Each step is $p \leftarrow p - \eta \, \partial L / \partial p$ (`sgd_update`), or
    the update of an optax transformation. The loop runs on the device, in pieces of
    about a tenth of a second, so that Ctrl-C and the progress bar work.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree; static and fixed leaves stay as they are.
      *args: the rest of the loss's arguments, the same at every step.
      steps: how many updates to make.
      learning_rate: $\eta$ of `sgd_update`: a number, a scalar array, or a function of
        the step. Either this or `optimizer` is given.
      optimizer: any `optax.GradientTransformation`.
      tolerance: stop when the loss is under it.
      record_every: record the loss and the gradient's norm every so many steps.
      state: `result.state` of an earlier run, to go on from it: parameters and
        optimizer state are taken from there, and `params` gives only the structure and
        the static leaves. n steps, then m more, end in the same bits as n + m.
      has_aux: the loss returns `(loss, aux)`; the aux is dropped.
      progress: show a progress bar on stderr; `None`: if stderr is a terminal.

    Returns:
      A `TrainResult`. A loss, gradient or parameter that isn't finite stops the run
      before the update that it would spoil, and so does Ctrl-C.

    Raises:
      TypeError: neither or both of `learning_rate` and `optimizer`; and as
        `value_and_grad`.
      ValueError: a negative or non-finite learning rate, `steps` below 0,
        `record_every` below 1, or a `state` that belongs to other parameters or to
        another optimizer.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
      >>> x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
      >>> result = jaxgrad.train(jaxgrad.linear_loss, params, x, y,
      ...                        steps=100, learning_rate=0.01, tolerance=1e-6)
      >>> print(result.losses[:2], result.steps)
      [6.25   3.0625] 22
    """
    _check_arguments(steps, learning_rate, optimizer, record_every)
    schedule, given = (
        (learning_rate, None) if callable(learning_rate) else (None, learning_rate)
    )
    trained, held = partition(as_params(params))
    trained = jax.tree.map(jnp.asarray, trained)
    compile_for: Any = once_per_loss(
        loss,
        ("train", has_aux),
        # The last few optimizers: a sweep makes a new one for each of its runs.
        lambda get_loss: functools.lru_cache(maxsize=8)(
            functools.partial(_compile, get_loss, has_aux)
        ),
    )
    try:
        hash((schedule, optimizer))
    except TypeError:
        compile_for = compile_for.__wrapped__
    compiled: _Compiled = compile_for(schedule, optimizer)
    begin = TrainState(jnp.zeros((), jnp.int32), trained, compiled.init(trained))
    if state is not None:
        _check_state(begin, state)
        begin = jax.tree.map(jnp.asarray, state)
    start = int(begin.step)
    if start + steps > np.iinfo(np.int32).max:
        raise ValueError(f"{start + steps} steps are more than an int32 can count.")

    settings = _Settings(
        learning_rate=jnp.asarray(0.0 if given is None else given),
        tolerance=jnp.asarray(-jnp.inf if tolerance is None else tolerance),
        record_every=jnp.asarray(record_every, jnp.int32),
    )
    advance = functools.partial(_advance, compiled.run, (held, *args, settings))
    with _bar(progress, steps) as report:
        done = _in_pieces(advance, begin, start + steps, report)

    made = int(done.loop.state.step) - start
    # Ctrl-C may have come between the records of a piece and the piece itself.
    records = -(-made // record_every)
    records += bool(done.loop.stop != _GO_ON and made % record_every == 0)
    return TrainResult(
        params=combine(done.loop.state.params, held),
        losses=np.concatenate(done.losses)[:records],
        gradient_norms=np.concatenate(done.norms)[:records],
        steps=made,
        stopped=_reason(done, trained, tolerance),
        state=done.loop.state,
    )


# Long enough that starting a piece costs nothing, short enough for Ctrl-C and the bar.
_PIECE_SECONDS = 0.1
# Records kept on the device in one piece: 1 MiB.
_CAPACITY = 1 << 17
_GO_ON, _REACHED, _LOSS = 0, -1, 1


class _Settings(NamedTuple):
    learning_rate: Any
    tolerance: Any
    record_every: Any


class _Loop(NamedTuple):
    """What goes round: `due` steps until the next record, and why to stop, if so."""

    state: TrainState
    due: Int[Array, ""]
    stop: Int[Array, ""]


class _Records(NamedTuple):
    losses: Float[Array, " capacity"]
    norms: Float[Array, " capacity"]
    filled: Int[Array, ""]


class _Compiled(NamedTuple):
    """The optimizer's `init(params)`, and the compiled loop."""

    init: Callable[[PyTree], PyTree]
    run: Callable[..., tuple[_Loop, _Records]]


class _Done(NamedTuple):
    """How far a run has come, and what it recorded on its way."""

    loop: _Loop
    losses: list[Any]
    norms: list[Any]
    interrupted: bool


def _advance(
    run: Callable[..., Any], operands: tuple[Any, ...], loop: _Loop, limit: int
) -> tuple[_Loop, _Records]:
    """Runs the compiled loop until the step `limit`, or until it stops by itself."""
    until = jnp.asarray(limit, jnp.int32)
    return run(*split_static((*operands, loop, until)))  # type: ignore[no-any-return]


def _in_pieces(
    advance: Callable[[_Loop, int], tuple[_Loop, _Records]],
    begin: TrainState,
    end: int,
    report: Callable[[int], None],
) -> _Done:
    """Advances to the step `end`, in pieces that take about `_PIECE_SECONDS` each."""
    zero = jnp.zeros((), jnp.int32)
    loop, losses, norms = _Loop(begin, due=zero, stop=zero), [], []
    step = start = int(begin.step)
    size, interrupted = 1, False
    try:
        while step < end and not loop.stop:
            began = time.perf_counter()
            after, records = advance(loop, min(step + size, end))
            filled = int(records.filled)  # waits for the device
            losses.append(np.asarray(records.losses)[:filled])
            norms.append(np.asarray(records.norms)[:filled])
            loop, before, step = after, step, int(after.state.step)
            report(step - start)
            pace = (time.perf_counter() - began) / max(step - before, 1)
            size = max(1, min(10 * size, int(_PIECE_SECONDS / pace)))
    except KeyboardInterrupt:
        interrupted = True
    empty = [np.zeros(0, jnp.zeros(0).dtype)]
    return _Done(loop, losses or empty, norms or empty, interrupted)


def update_rule(schedule: Schedule | None, optimizer: Any) -> tuple[Any, Any]:
    """`init(params)` and `update(params, grads, state, rate, value, value_fn)`."""
    if optimizer is None:

        def by_hand(
            params: PyTree, grads: PyTree, state: PyTree, rate: Any, *_: Any
        ) -> tuple[PyTree, PyTree]:
            return sgd_update(
                params,
                grads=grads,
                state=state,
                learning_rate=schedule or rate,
            )

        return init_sgd, by_hand

    import optax

    transform = optax.with_extra_args_support(optimizer)

    def by_optax(
        params: PyTree, grads: PyTree, state: PyTree, _: Any, value: Any, value_fn: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    return transform.init, by_optax


def _compile(
    get_loss: Callable[[], Loss],
    has_aux: bool,
    schedule: Schedule | None,
    optimizer: Any,
) -> _Compiled:
    init, update = update_rule(schedule, optimizer)

    def run(operands: tuple[Any, ...]) -> tuple[_Loop, _Records]:
        held, *args, settings, first, limit = operands

        def value_and_grad(trained: PyTree) -> tuple[Any, PyTree]:
            value, _, gradient = differentiate(
                get_loss(), combine(trained, held), tuple(args), has_aux
            )
            return value, gradient

        def step(carry: tuple[_Loop, _Records]) -> tuple[_Loop, _Records]:
            loop, records = carry
            old = loop.state
            value, gradient = value_and_grad(old.params)
            params, optimizer = update(
                old.params,
                gradient,
                old.optimizer,
                settings.learning_rate,
                value,
                lambda trained: value_and_grad(trained)[0],
            )
            stop = _stop(value, gradient, params, settings.tolerance)
            new = TrainState(old.step + 1, params, optimizer)
            kept = jax.tree.map(
                lambda n, o: o if n is o else jnp.where(stop == _GO_ON, n, o), new, old
            )

            now = loop.due == 0
            # What isn't due goes to a slot past the end, where nobody looks.
            slot = jnp.where(now, records.filled, _CAPACITY)
            return _Loop(
                state=kept,
                due=jnp.where(now, settings.record_every, loop.due) - 1,
                stop=stop,
            ), _Records(
                losses=_put(records.losses, slot, value),
                norms=_put(records.norms, slot, _norm(gradient)),
                filled=records.filled + now,
            )

        def going(carry: tuple[_Loop, _Records]) -> Any:
            loop, records = carry
            return (
                (loop.state.step < limit)
                & (loop.stop == _GO_ON)
                & (records.filled < _CAPACITY)
            )

        empty = jnp.zeros(_CAPACITY + 1, float)
        records = _Records(empty, empty, jnp.zeros((), jnp.int32))
        return jax.lax.while_loop(going, step, (first, records))

    return _Compiled(init, jit_general(run))


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
    bad: Any = _GO_ON
    for place in reversed(range(len(leaves))):
        finite = jnp.all(jnp.isfinite(leaves[place]))
        bad = jnp.where(finite, bad, 1 + place)
    reached = jnp.isfinite(value) & (value < tolerance)
    return jnp.where(reached, _REACHED, bad).astype(jnp.int32)


def _reason(done: _Done, trained: PyTree, tolerance: float | None) -> str | None:
    stop, step = int(done.loop.stop), int(done.loop.state.step)
    if stop == _GO_ON:
        return f"interrupted before update {step}" if done.interrupted else None
    if stop == _REACHED:
        return f"tolerance: the loss is under {tolerance:g} before update {step}"
    if stop == _LOSS:
        return f"non-finite loss before update {step}"
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    where = stop - _LOSS - 1
    name = leaf_name(paths[where % len(paths)])
    if where < len(paths):
        return f"non-finite gradient of leaf `{name}` before update {step}"
    return f"non-finite parameter: update {step} would spoil leaf `{name}`"


def _bar(progress: bool | None, steps: int) -> Any:
    """A context that gives a function of the steps done: a progress bar, or nothing."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return nullcontext(lambda done: None)

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self) -> Callable[[int], None]:  # type: ignore[override]
            super().__enter__()
            task = self.add_task("training", total=steps)
            return lambda done: self.update(task, completed=done)

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    return Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _check_arguments(
    steps: int, learning_rate: Any, optimizer: Any, record_every: int
) -> None:
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise TypeError(
            f"train needs a learning_rate (for sgd_update) or an optimizer (of optax), "
            f"one of the two, and was given {given}."
        )
    if optimizer is not None and not (
        callable(getattr(optimizer, "init", None))
        and callable(getattr(optimizer, "update", None))
    ):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3), and is a {type(optimizer).__name__}."
        )
    if learning_rate is not None and not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, and is {steps}.")
    if record_every < 1:
        raise ValueError(f"record_every must be 1 or more, and is {record_every}.")


def _check_state(fresh: TrainState, state: TrainState) -> None:
    for tree in ("params", "optimizer"):
        want, have = (
            _leaves(f"state.{tree}", getattr(s, tree)) for s in (fresh, state)
        )
        for leaf in [*want, *have]:
            if want.get(leaf) != have.get(leaf):
                raise ValueError(
                    f"`state` isn't of these params and this optimizer: leaf `{leaf}` "
                    f"should be {want.get(leaf, 'absent')}, and is "
                    f"{have.get(leaf, 'absent')}. Give the same params and optimizer "
                    "as in the run that returned it."
                )


def _leaves(root: str, tree: PyTree) -> dict[str, str]:
    """Every leaf's dtype and shape in words, by its name."""
    return {
        leaf_name(path, root): f"{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
