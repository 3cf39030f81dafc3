"""Trains on batches that come one by one, the next on its way while one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad.training.loop import Loop
from jaxgrad.training.pieces import Agree, Done
from jaxgrad.training.source import Ready, Trouble

# One step is computed while the next is prepared. More would tell of a failed step
# later, and hold more batches in memory.
_AHEAD = 1
_READY, _ENDED, _FAILED = range(3)

Advance = Callable[[Loop, Ready], tuple[Loop, Any, Any]]


def in_batches(
    advance: Advance,
    loop: Loop,
    batches: Iterator[Ready],
    end: int | None,
    every: int,
    agree: Agree | None,
    report: Callable[[int], None],
) -> Done:
    """Makes a step with each batch, until the step `end` or until they end.

    `agree` is `None` if this process is alone.
    """
    step = start = int(loop.state.step)
    records: dict[int, tuple[Any, Any]] = {}
    under_way: deque[tuple[int, Loop, Any, Any]] = deque()

    def settle(most: int) -> bool:
        """Waits until at most so many steps are under way; true if one has stopped."""
        stopped = False
        while len(under_way) > most and not stopped:
            # Ctrl-C may come at any of these: what is noted twice is the same.
            number, after, value, norm = under_way[0]
            stopped = bool(after.stop)  # waits for the device
            if number % every == 0:
                records[number] = np.asarray(value), np.asarray(norm)
            report(int(after.state.step) - start)
            under_way.popleft()
        return stopped

    interrupted, trouble, stopped = False, None, False
    try:
        first = None
        while not stopped and (end is None or step < end):
            batch = _next(batches, agree)
            if batch is None:
                if end is not None:
                    raise Trouble(_too_few(step - start, end - start))
                break
            first = first or batch._replace(parts=[])  # not its arrays
            after, value, norm = _step(advance, loop, batch, first)
            under_way.append((step - start, after, value, norm))
            loop, step = after, step + 1
            stopped = settle(_AHEAD)
    except KeyboardInterrupt:
        interrupted = True
    except Trouble as error:
        trouble = error
    stopped or settle(0)
    why = f"interrupted before update {int(loop.state.step)}" if interrupted else None
    losses, norms = ([pair[k] for pair in records.values()] for k in (0, 1))
    empty = jnp.zeros(0).dtype
    return Done(
        loop,
        [np.array(losses, losses[0].dtype if losses else empty)],
        [np.array(norms, norms[0].dtype if norms else empty)],
        why,
        trouble,
    )


def _step(
    advance: Advance, loop: Loop, batch: Ready, first: Ready
) -> tuple[Loop, Any, Any]:
    try:
        return advance(loop, batch)
    except Exception as error:
        for leaf, shape in batch.shapes.items():
            if shape != first.shapes[leaf]:
                raise Trouble(
                    f"the loss fails on {batch.name}, in which leaf `{leaf}` has shape "
                    f"{shape}; in {first.name} it has {first.shapes[leaf]}. "
                    f"{type(error).__name__}: {error}"
                ) from error
        if batch.name == first.name:
            error.add_note(f"in the first step, on {batch.name}")
        raise


def _next(batches: Iterator[Ready], agree: Agree | None) -> Ready | None:
    """The next batch; `None` if there's no more, for all processes."""
    if agree is None:
        return next(batches, None)
    status, batch, trouble = _READY, None, None
    try:
        batch = next(batches, None)
        status = _READY if batch else _ENDED
    except Trouble as error:
        status, trouble = _FAILED, error
    table = agree(status, batch.rows if batch else 0)
    if trouble is not None:
        raise trouble
    if table[:, -1].any():
        raise KeyboardInterrupt
    for process, (state, rows, _) in enumerate(table.tolist()):
        if state == _FAILED:
            raise Trouble(f"process {process} has failed on its batch; see its message")
        if state != status:
            whose = f"process {process}" if state == _ENDED else "this process"
            raise Trouble(
                f"those of {whose} have ended, and another has more: all processes "
                "must give equally many"
            )
        if batch is not None and rows != batch.rows:
            raise Trouble(
                f"{batch.name} has {batch.rows} rows here and {rows} in process "
                f"{process}. All processes must give equally many"
            )
    return batch


def _too_few(came: int, wanted: int) -> str:
    return (
        f"they ended after {came} of {wanted} steps. Give more, or steps=None to take "
        "what comes; for several epochs of a loader: "
        "`itertools.chain.from_iterable(itertools.repeat(loader, epochs))`"
    )
