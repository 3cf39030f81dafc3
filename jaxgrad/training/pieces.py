"""Runs the loop in pieces: Ctrl-C, a progress bar, and agreement with others."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.training.loop import Loop, Records

# Long enough that starting a piece costs nothing, short enough for Ctrl-C and the bar.
_PIECE_SECONDS = 0.1


class Done(NamedTuple):
    """How far a run has come, and what it recorded on its way.

    `stopped` says why it has stopped, where the loop itself doesn't; `error` is what
    it has stopped for, if the data are to blame.
    """

    loop: Loop
    losses: list[Any]
    norms: list[Any]
    stopped: str | None = None
    error: Exception | None = None


Agree = Callable[..., np.ndarray]
"""Gives the numbers of all processes, a row each; the last is 1 if interrupted."""


@contextlib.contextmanager
def agreement(several: bool) -> Iterator[Agree]:
    """How the processes of a run choose alike: how far to go next, whether to stop.

    Each of them must call the same programs in the same order, so that a piece's
    length, which follows from a clock, and Ctrl-C, which comes to one of them, are
    told to all. Alone, Ctrl-C is Python's own KeyboardInterrupt.
    """
    if not several:
        yield lambda *numbers: np.array([[*numbers, 0]])
        return

    from jax.experimental.multihost_utils import process_allgather

    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:  # a second time: at once
            raise KeyboardInterrupt
        asked.append(number)

    def agree(*numbers: int) -> np.ndarray:
        mine = np.array([*numbers, len(asked)], np.int32)
        try:
            return np.asarray(process_allgather(mine))
        except Exception as error:
            raise RuntimeError(
                "The processes of this run can't reach each other any more: one has "
                "ended, and its own output says why. Start all of them again, from the "
                f"last state that was saved. ({error})"
            ) from error

    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, ask) if handles else None
    try:
        yield agree
    finally:
        if handles:
            signal.signal(signal.SIGINT, before)


def in_pieces(
    advance: Callable[[Loop, int], tuple[Loop, Records]],
    loop: Loop,
    end: int,
    agree: Agree,
    report: Callable[[int], None],
) -> Done:
    """Advances to the step `end`, in pieces that take about `_PIECE_SECONDS` each."""
    losses, norms = [], []
    step = start = int(loop.state.step)
    size, interrupted = 1, False
    try:
        while step < end and not loop.stop:
            began = time.perf_counter()
            table = agree(size)
            size, interrupted = int(table[:, 0].min()), bool(table[:, -1].any())
            if interrupted:
                break
            after, records = advance(loop, min(step + size, end))
            filled = int(records.filled)  # waits for the device
            # Copies: a part of the buffer would keep all of it.
            losses.append(np.asarray(records.losses)[:filled].copy())
            norms.append(np.asarray(records.norms)[:filled].copy())
            loop, before, step = after, step, int(after.state.step)
            report(step - start)
            pace = (time.perf_counter() - began) / max(step - before, 1)
            size = max(1, min(10 * size, int(_PIECE_SECONDS / pace)))
    except KeyboardInterrupt:
        interrupted = True
    stopped = f"interrupted before update {step}" if interrupted else None
    empty = [np.zeros(0, jnp.zeros(0).dtype)]
    return Done(loop, losses or empty, norms or empty, stopped)


def progress_bar(progress: bool | None, steps: int | None) -> Any:
    """A context that gives a function of the steps done: a progress bar, or nothing."""
    if not (sys.stderr.isatty() if progress is None else progress):
        return contextlib.nullcontext(lambda done: None)

    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    class Bar(Progress):
        def __enter__(self) -> Callable[[int], None]:  # type: ignore[override]
            super().__enter__()
            task = self.add_task("training", total=steps)
            return lambda done: self.update(task, completed=done)

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    return Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
