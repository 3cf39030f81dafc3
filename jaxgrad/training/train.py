"""The call: `train`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxgrad.gradients import once_per_loss
from jaxgrad.placing import (
    check_devices,
    layout_of,
    layouts_of,
    put_together,
    several_devices,
    spans_processes,
)
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    as_params,
    combine,
    foreign,
    kind_of,
    operand_name,
    partition,
    split_static,
)
from jaxgrad.sgd import Schedule
from jaxgrad.training.arguments import (
    check_arguments,
    check_batching,
    check_keys,
    whole,
)
from jaxgrad.training.axes import (
    count_rows,
    devices_of_rows,
    layouts_per_leaf,
    per_leaf,
    uneven,
)
from jaxgrad.training.loop import GO_ON, Compiled, Loop, Settings, compile_loop, reason
from jaxgrad.training.pieces import Done, agreement, in_pieces, progress_bar
from jaxgrad.training.results import BatchError, TrainResult, TrainState, check_state
from jaxgrad.training.rows import Rows
from jaxgrad.training.source import Laying, Ready, ready_batches
from jaxgrad.training.stream import in_batches


def train(
    loss: Loss,
    params: PyTree,
    *args: Any,
    steps: int | None = None,
    learning_rate: float | Float[ArrayLike, ""] | Schedule | None = None,
    optimizer: Any = None,
    batch_size: int | None = None,
    batch_axes: PyTree = 0,
    shuffle_key: jax.Array | None = None,
    drop_last: bool = False,
    batches: Iterable[Any] | None = None,
    batch_sharding: PyTree = None,
    reduction: str | None = None,
    step_key: jax.Array | None = None,
    tolerance: float | None = None,
    record_every: int = 1,
    state: TrainState | None = None,
    has_aux: bool = False,
    progress: bool | None = None,
) -> TrainResult:
    r"""Trains parameters by gradient descent, in one compiled loop.

    Each step is $p \leftarrow p - \eta \, \partial L / \partial p$ (`sgd_update`), or
    the update of an optax transformation. The loop runs on the device, in pieces of
    about a tenth of a second, so that Ctrl-C and the progress bar work.

    A step takes all of `args`; or `batch_size` rows of them, each row once an epoch,
    gathered inside the loop; or what an iterable of `batches` yields, the next being
    put on the device while the last one computes. Parameters and data may be spread
    over many devices: the gradient is that of the whole batch, and what is returned
    has the parameters' sharding.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree; static and fixed leaves stay as they are.
      *args: the rest of the loss's arguments, the same at every step.
      steps: how many updates to make; `None` only with `batches`: until they end.
      learning_rate: $\eta$ of `sgd_update`: a number, a scalar array, or a function of
        the step. Either this or `optimizer` is given.
      optimizer: any `optax.GradientTransformation`.
      batch_size: how many rows of `args` a step takes. The last batch of an epoch may
        have fewer; its loss is of its own rows alone.
      batch_axes: which axis of each argument counts its rows, as `vmap`'s `in_axes`:
        one for all, or a pytree prefix of `args` (of a batch, with `batches`); `None`
        for what has no rows.
      shuffle_key: a key: each epoch has an order of its own. `None`: in order.
      drop_last: leave out the last batch of an epoch if it is a short one (with
        `batches`: any that has fewer rows than one before).
      batches: yields tuples of arguments: `loss(params, *args, *batch)`. A generator,
        or any loader of NumPy, JAX or PyTorch arrays. It goes on where `state` ends:
        to skip what was used, `itertools.islice(loader, int(state.step), None)`.
      batch_sharding: a `NamedSharding` (or a prefix, as `batch_axes`) that says how a
        batch is spread over devices. By default rows of `args` stay spread as they
        are, and `batches` are left where they are, or copied to each device. In
        several processes, each yields its own rows of the batch.
      reduction: `"mean"` says that the loss is a mean over rows, each by itself (with
        a batch norm it isn't): then rows that don't divide over the devices are
        computed apart, and the two parts weighted.
      step_key: a key, which is folded with the step and given to the loss as `key=`.
      tolerance: stop when the loss (of the step's batch) is under it.
      record_every: record the loss and the gradient's norm every so many steps.
      state: `result.state` of an earlier run, to go on from it: parameters, optimizer
        state and the place in the data are taken from there, and `params` gives only
        the structure and the static leaves. n steps, then m more, end in the same bits
        as n + m.
      has_aux: the loss returns `(loss, aux)`; the aux is dropped.
      progress: show a progress bar on stderr; `None`: if stderr is a terminal.

    Returns:
      A `TrainResult`. A loss, gradient or parameter that isn't finite stops the run
      before the update that it would spoil, and so does Ctrl-C.

    Raises:
      TypeError: neither or both of `learning_rate` and `optimizer`; an option that
        goes with another one; a loss without `key`, given `step_key`; a number that
        should be an integer; a `state` that isn't one; and as `value_and_grad`.
      ValueError: a negative or non-finite learning rate, `steps` below 0,
        `record_every` or `batch_size` below 1; arrays that differ in their number of
        rows, or are on different devices; rows that don't divide over the devices; or
        a `state` of other parameters, another optimizer, other keys or other batches.
      BatchError: the `batches` end before `steps`, fail, or change their structure.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
      >>> x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
      >>> result = jaxgrad.train(jaxgrad.linear_loss, params, x, y,
      ...                        steps=100, learning_rate=0.01, tolerance=1e-6)
      >>> print(result.losses[:2], result.steps)
      [6.25   3.0625] 22
    """
    record_every = whole("record_every", record_every)
    steps = None if steps is None else whole("steps", steps)
    batch_size = None if batch_size is None else whole("batch_size", batch_size)
    check_arguments(steps, learning_rate, optimizer, record_every)
    check_batching(steps, batch_size, shuffle_key, drop_last, batches, reduction)
    check_keys(loss, len(args), shuffle_key, step_key)
    schedule, given = (
        (learning_rate, None) if callable(learning_rate) else (None, learning_rate)
    )
    trained, held = partition(as_params(params))
    trained = jax.tree.map(jnp.asarray, trained)
    if several_devices():
        check_devices(_named(params, *args))
    rows = None
    if batch_size is not None:
        rows = _rows(args, batch_size, batch_axes, drop_last, batch_sharding, reduction)
    compile_for: Any = once_per_loss(
        loss,
        ("train", has_aux),
        # The last few optimizers: a sweep makes a new one for each of its runs.
        lambda get_loss: functools.lru_cache(maxsize=8)(
            functools.partial(compile_loop, get_loss, has_aux)
        ),
    )
    try:
        hash((schedule, optimizer))
    except TypeError:
        compile_for = compile_for.__wrapped__
    compiled: Compiled = compile_for(schedule, optimizer)
    begin = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trained,
        optimizer=compiled.init(trained),
        batching=_batching(rows, shuffle_key, step_key),
    )
    if state is not None:
        check_state(begin, state)
        begin = jax.tree.map(_laid_like, begin, state)
    start = int(begin.step)
    end = None if steps is None else start + steps
    if end is not None and end > np.iinfo(np.int32).max:
        raise ValueError(f"{end} steps are more than an int32 can count.")

    zero = jnp.zeros((), jnp.int32)
    settings = Settings(
        learning_rate=jnp.asarray(0.0 if given is None else given),
        tolerance=jnp.asarray(-jnp.inf if tolerance is None else tolerance),
        record_every=jnp.asarray(record_every, jnp.int32),
        shuffle_key=shuffle_key,
        step_key=step_key,
    )
    loop = Loop(begin, due=zero, stop=zero)
    loop, settings = put_together((loop, settings), args, batch_sharding)
    layouts = layouts_of(loop.state)
    several = spans_processes((loop, args))

    def advance(loop: Loop, until: int) -> Any:
        rest = rows, layouts, settings, loop, jnp.asarray(until, jnp.int32)
        return compiled.run(*split_static((held, *args, rest)))

    def advance_on(loop: Loop, batch: Ready) -> Any:
        rest = tuple(part.size for part in batch.parts), layouts, settings, loop
        parts = [(*args, *part.args) for part in batch.parts]
        return compiled.once(*split_static((held, *parts, rest)))

    with agreement(several) as agree, progress_bar(progress, steps) as report:
        if batches is None:
            assert end is not None
            done = in_pieces(advance, loop, end, agree, report)
        else:
            laying = Laying(
                before=len(args),
                axes=batch_axes,
                layout=batch_sharding,
                like=_named(loop.state.params) if several_devices() else [],
                drop_last=drop_last,
                weighted=reduction == "mean",
                several=several,
            )
            done = in_batches(
                advance_on,
                loop,
                ready_batches(batches, laying),
                end,
                record_every,
                agree if several else None,
                report,
            )
    return _result(done, start, trained, held, tolerance, record_every)


def _result(
    done: Done,
    start: int,
    trained: PyTree,
    held: PyTree,
    tolerance: float | None,
    record_every: int,
) -> TrainResult:
    made = int(done.loop.state.step) - start
    # Ctrl-C may have come between the records of a piece and the piece itself.
    records = -(-made // record_every)
    failed = int(done.loop.stop) != GO_ON
    records += bool(failed and made % record_every == 0)
    stopped = reason(done.loop, trained, tolerance) or done.stopped
    error = None if failed else done.error
    result = TrainResult(
        params=combine(done.loop.state.params, held),
        losses=np.concatenate(done.losses)[:records],
        gradient_norms=np.concatenate(done.norms)[:records],
        steps=made,
        stopped=f"batches: {error}" if error else stopped,
        state=done.loop.state,
    )
    if error is not None:
        said = str(error).rstrip(". ")
        message = (
            f"batches: {said}. The run until then (updates: {made}) is this error's "
            "`result`; `state=error.result.state` goes on from it."
        )
        raise BatchError(message, result) from error.__cause__
    return result


def _named(*operands: Any) -> list[tuple[str, Any]]:
    """The leaves of `(params, *args)` with their names."""
    named = jax.tree_util.tree_leaves_with_path(operands)
    return [(operand_name(path), leaf) for path, leaf in named]


def _laid_like(fresh: Any, saved: Any) -> Any:
    """A leaf of a saved state, laid over devices as the one it takes the place of."""
    layout = layout_of(fresh)
    if layout is None or layout_of(saved) is not None:
        return jnp.asarray(saved)
    return jax.device_put(saved, layout)


def _rows(
    args: tuple[Any, ...],
    batch_size: int,
    batch_axes: PyTree,
    drop_last: bool,
    batch_sharding: PyTree,
    reduction: str | None,
) -> Rows:
    """How `args` are cut into batches.

    Raises:
      ValueError: nothing has rows, arrays differ in them, there are too few for a
        batch, or a batch doesn't divide over its devices.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, and is {batch_size}.")
    named = _named(None, *args)
    for name, leaf in named:
        if kind_of(leaf) == "foreign":
            raise TypeError(f"Leaf `{name}` is {foreign(leaf)}.")
    count, axes = count_rows(named, per_leaf(batch_axes, args, "batch_axes"))
    if not count:
        none = "there are none" if count is None else "they have no rows"
        raise ValueError(
            f"batch_size takes rows of the arrays in *args, and {none}. (A list of "
            "numbers is no array: `jnp.asarray(list)` is.)"
        )
    if drop_last and count < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {count} rows there are, and "
            "drop_last=True leaves out a batch that is short."
        )
    batch_size = min(batch_size, count)
    layouts = layouts_per_leaf(batch_sharding, args)
    if several_devices():
        layouts = [
            layout or layout_of(leaf)
            for layout, (_, leaf) in zip(layouts, named, strict=True)
        ]
    rows = Rows(count, batch_size, drop_last, axes, tuple(layouts))
    devices = devices_of_rows(axes, layouts)
    for what, size in (
        (f"A batch (batch_size={batch_size})", batch_size),
        ("The last batch of an epoch (drop_last=True leaves it out)", rows.short),
    ):
        if size % devices and reduction != "mean":
            raise ValueError(uneven(what, size, devices))
    return rows


def _batching(rows: Rows | None, shuffle_key: Any, step_key: Any) -> dict[str, Any]:
    """What must be the same for a run to go on to the same bits, as arrays."""
    facts: dict[str, Any] = {}
    if rows is not None:
        facts["rows"] = jnp.asarray(rows.count, jnp.int32)
        facts["batch_size"] = jnp.asarray(rows.batch_size, jnp.int32)
        facts["drop_last"] = jnp.asarray(rows.drop_last, jnp.int32)
    for name, key in (("shuffle_key", shuffle_key), ("step_key", step_key)):
        if key is not None:
            typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
            facts[name] = jax.random.key_data(key) if typed else jnp.asarray(key)
    return facts
