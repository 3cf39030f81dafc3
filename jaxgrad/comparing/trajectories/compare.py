"""Do the optimizers of both sides move the parameters alike, and if not, why?

Two runs, JAX's and PyTorch's, go side by side. Where they part, PyTorch's optimizer is
run again with JAX's gradients. If it then moves as JAX's does, the gradients differ, or
rounding has grown; if not, the optimizers do.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.comparing.trajectories.forcing import (
    Tolerance,
    force,
    forced_causes,
    tolerance_of,
)
from jaxgrad.comparing.trajectories.running import (
    LEARNING_RATE,
    Array,
    JaxMover,
    JaxStep,
    Mover,
    TorchMover,
    TorchStep,
    jax_steps,
    mover_of,
    norm,
    torch_begin,
    torch_steps,
)

__all__ = ["JaxMover", "TorchMover", "Trajectory", "check_optimizers", "trajectories"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """How two optimizers moved the parameters.

    Attributes:
      ok: they moved them alike, or parted no more than rounding explains.
      steps: how many steps were compared: fewer than asked for where a number isn't
        finite.
      losses: of `jaxgrad.sgd_update`, `optax` and `torch`, the loss before each step.
      first_step: the step, counted from 1, at which they first part by more than
        rounding explains; `None` if they don't.
      torch_name: the parameter that is furthest off there; if they don't part, the one
        that is furthest off after the last step.
      error: how far that parameter's movement since the start is from PyTorch's, as a
        share of PyTorch's.
      step_error: the same of that step alone.
      causes: why they part: two where it takes two changes to explain it.
    """

    ok: bool
    steps: int
    losses: dict[str, tuple[float, ...]]
    first_step: int | None
    torch_name: str | None
    error: float
    step_error: float
    causes: tuple[Cause, ...]

    @property
    def cause(self) -> Cause | None:
        """The first cause."""
        return self.causes[0] if self.causes else None


def trajectories(
    jax_side: JaxMover,
    torch_side: TorchMover,
    *,
    steps: int,
    optimizer: Any = None,
    torch_optimizer: Any = None,
) -> Trajectory:
    """Runs both sides for some steps, and compares how the parameters move.

    Args:
      jax_side: JAX's loss.
      torch_side: PyTorch's. Its parameters end somewhere else than they began.
      steps: how many.
      optimizer: an `optax.GradientTransformation`.
      torch_optimizer: makes an optimizer of a list of parameters. Without the two,
        `jaxgrad.sgd_update`, `optax.sgd` and `torch.optim.SGD` are compared, at a
        learning rate of 0.01.

    Raises:
      TypeError: one of the optimizers is no such thing.
      ValueError: one of the two is missing, `steps` is negative, or an optimizer needs
        a closure.
    """
    check_optimizers(steps, optimizer, torch_optimizer)
    make: Callable[[list[Any]], Any]
    if torch_optimizer is None:
        import optax
        import torch

        sgd = optax.sgd(LEARNING_RATE)
        movers = {"jaxgrad.sgd_update": mover_of(None), "optax": mover_of(sgd)}
        make = functools.partial(torch.optim.SGD, lr=LEARNING_RATE)
    else:
        movers, make = {"optax": mover_of(optimizer)}, torch_optimizer
    dtypes = [np.asarray(leaf).dtype for leaf in jax_side.start.values()]
    tolerance = tolerance_of(max(_epsilon(d) for d in dtypes))
    wide = any(dtype == np.float64 for dtype in dtypes)
    with jax.enable_x64(True) if wide else nullcontext():
        return _compare(jax_side, torch_side, movers, make, steps, tolerance)


def check_optimizers(steps: int, optimizer: Any, torch_optimizer: Any) -> None:
    """Raises an error if no trajectories can be run with these."""
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, and is {steps}.")
    if (optimizer is None) != (torch_optimizer is None):
        given, missing = "optimizer", "torch_optimizer"
        if optimizer is None:
            given, missing = missing, given
        raise ValueError(
            f"{given} is given, and {missing} isn't: give both, or neither for plain "
            "SGD on both sides."
        )
    if optimizer is None:
        return
    if not all(callable(getattr(optimizer, n, None)) for n in ("init", "update")):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3), and is a {type(optimizer).__name__}."
        )
    if not callable(torch_optimizer) or hasattr(torch_optimizer, "param_groups"):
        raise TypeError(
            "torch_optimizer must be a function that makes an optimizer of a list of "
            "parameters, such as lambda ps: torch.optim.Adam(ps), and is "
            f"a {type(torch_optimizer).__name__}."
        )


class _Apart(NamedTuple):
    """How far two runs are apart after a step, per parameter, as shares."""

    since_start: dict[str, float]
    this_step: dict[str, float]
    beyond: bool
    """Rounding doesn't explain it."""


class _Verdict(NamedTuple):
    """Why two runs part: at which step, in which parameter, if that is known."""

    step: int
    name: str | None
    causes: tuple[Cause, ...]


@np.errstate(over="ignore", invalid="ignore")  # a run may overflow
def _compare(
    jax_side: JaxMover,
    torch_side: TorchMover,
    movers: Mapping[str, Mover],
    make: Callable[[list[Any]], Any],
    steps: int,
    tolerance: Tolerance,
) -> Trajectory:
    optimizer = torch_begin(torch_side, make)
    fresh = copy.deepcopy(optimizer.state_dict())
    runs = {name: jax_steps(jax_side, mover) for name, mover in movers.items()}
    theirs = torch_steps(torch_side, optimizer)
    losses: dict[str, list[float]] = {name: [] for name in (*movers, "torch")}
    apart: dict[str, list[_Apart]] = {name: [] for name in movers}
    seen = {name: _Seen(tolerance) for name in movers}
    left_over: list[str] = []
    usable = made = 0
    for made in range(1, steps + 1):
        step = next(theirs)
        losses["torch"].append(step.loss)
        left_over = left_over or step.left_over
        finite = [_finite(step.loss, step.after)]
        for name, run in runs.items():
            ours = next(run)
            losses[name].append(ours.loss)
            seen[name].add(ours)
            apart[name].append(
                _apart(ours, step, torch_side.start, seen[name], tolerance)
            )
            finite.append(_finite(ours.loss, ours.after))
        if not all(finite):
            break
        usable = made
    if made > usable and not any(finite):
        made = usable  # both sides overflow at the same step
    told = {name: tuple(values) for name, values in losses.items()}
    name, first = _first(apart, made)
    verdict = None
    if first is not None and usable:
        again = torch_begin(torch_side, make)
        if again is optimizer:
            again.load_state_dict(fresh)
        verdict = _why(
            jax_side, torch_side, movers[name], again, usable, tolerance, left_over
        )
    if verdict is None and made > usable:
        text = "The numbers of only one side are finite after the last step."
        verdict = _Verdict(made, None, (Cause("unknown", text),))
    there = apart[name][(verdict.step if verdict else made) - 1] if made else None
    errors = {} if there is None else there.this_step if verdict else there.since_start
    worst = max(errors, key=lambda each: errors[each], default=None)
    worst = verdict.name or worst if verdict else worst
    return Trajectory(
        ok=verdict is None,
        steps=made,
        losses=told,
        first_step=verdict.step if verdict else None,
        torch_name=worst,
        error=there.since_start[worst] if there and worst else 0.0,
        step_error=there.this_step[worst] if there and worst else 0.0,
        causes=verdict.causes if verdict else (),
    )


def _why(
    jax_side: JaxMover,
    torch_side: TorchMover,
    mover: Mover,
    optimizer: Any,
    steps: int,
    tolerance: Tolerance,
    left_over: list[str],
) -> _Verdict | None:
    """Why the two sides part; `None` if rounding explains it."""
    forced = force(jax_side, torch_side, mover, optimizer, steps, tolerance)
    if forced.apart.any():
        step = int(np.flatnonzero(forced.apart.any(1))[0])
        ours, theirs = forced.ours, forced.theirs
        off = ours.norm(ours.moved - theirs.moved)[step] / theirs.slack()[step]
        worst = ours.names[int(np.argmax(off))]
        return _Verdict(step + 1, worst, forced_causes(forced))
    if left_over:
        text = (
            f"PyTorch's {forced.kind}.zero_grad leaves the gradients as they are (that "
            f"of `{left_over[0]}`, for one), so that each step is given the sum of all "
            "so far. The optimizers agree, given the same gradients."
        )
        return _Verdict(min(2, steps), None, (Cause("accumulated", text),))
    if forced.gradients is not None:
        step, name, share = forced.gradients
        text = (
            f"The gradients differ at step {step}, where the parameters are the same "
            f"(that of `{name}` by {share:.2g} of its norm). The optimizers agree, "
            "given the same gradients."
        )
        return _Verdict(step, name, (Cause("gradients", text),))
    return None


class _Seen:
    """The entries whose gradient is more than noise, or is 0, in the steps so far."""

    def __init__(self, tolerance: Tolerance):
        self.share, self.norm = tolerance.cancelled, 0.0
        self.most: dict[str, Array] = {}

    def add(self, step: JaxStep) -> None:
        self.norm = max(self.norm, step.norm)
        for name, g in step.gradients.items():
            self.most[name] = np.maximum(self.most.get(name, 0), np.abs(g))

    def only(self, name: str, moved: Array) -> Array:
        most = self.most[name]
        return np.where((most > 0) & (most < self.share * self.norm), 0, moved)


def _apart(
    ours: JaxStep,
    theirs: TorchStep,
    start: Mapping[str, Array],
    seen: _Seen,
    tolerance: Tolerance,
) -> _Apart:
    since_start, this_step, beyond = {}, {}, False
    for name, after in ours.after.items():
        now, before = theirs.after[name], theirs.before[name]
        moved = seen.only(name, now - before)
        off = norm(seen.only(name, after - ours.before[name]) - moved)
        since_start[name] = _share(
            norm(seen.only(name, after - now)), norm(seen.only(name, now - start[name]))
        )
        this_step[name] = _share(off, norm(moved))
        stored = 4 * tolerance.epsilon * norm(now)
        beyond |= not off <= tolerance.parted * norm(moved) + stored
    return _Apart(since_start, this_step, beyond)


def _first(apart: Mapping[str, list[_Apart]], made: int) -> tuple[str, int | None]:
    """Which of JAX's runs parts first from PyTorch's, and at which step."""
    steps = {
        name: next((i for i, a in enumerate(each[:made], 1) if a.beyond), None)
        for name, each in apart.items()
    }
    name = min(steps, key=lambda run: steps[run] or np.inf)
    return name, steps[name]


def _epsilon(dtype: Any) -> float:
    info: Any = jnp.finfo
    return float(info(dtype).eps)


def _finite(loss: float, arrays: Mapping[str, Array]) -> bool:
    return bool(np.isfinite(loss)) and all(
        np.isfinite(array).all() for array in arrays.values()
    )


def _share(off: float, size: float) -> float:
    if off == 0:
        return 0.0
    return off / size if size else float("inf")
