"""Runs PyTorch's optimizer with JAX's gradients, so that it answers for itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.comparing.trajectories.options import Who, named
from jaxgrad.comparing.trajectories.rules import Rule, Steps, rule_of
from jaxgrad.comparing.trajectories.running import (
    Array,
    Arrays,
    JaxMover,
    JaxStep,
    Mover,
    TorchMover,
    jax_steps,
    names_of,
    norm,
    torch_gradients,
    torch_values,
)
from jaxgrad.comparing.trajectories.searching import find_optimizer_causes, misfit


class Tolerance(NamedTuple):
    """What rounding explains.

    In float32 an optimizer's own arithmetic errs by up to 3e-5 of a movement: half of
    what rounding does to the 1 - 0.999 of Adam's first step. In float64 a learning
    rate that was rounded to float32 is off by 2e-8. A gradient errs by about ten
    roundings of its norm, and where its terms cancel, of those of the whole gradient.

    Attributes:
      epsilon: of the dtype.
      parted: of a step's movement, between two runs.
      fitted: of a step's movement, between rules that were given the same gradients.
      gradient: of the gradient of a parameter.
      cancelled: of the whole gradient; an entry below it is noise, unless it is 0.
    """

    epsilon: float
    parted: float
    fitted: float
    gradient: float
    cancelled: float


def tolerance_of(epsilon: float) -> Tolerance:
    """What rounding explains, in a dtype of that epsilon."""
    if epsilon < 1e-10:
        return Tolerance(epsilon, 1e-6, 1e-7, 1e-6, 1e-12)
    loose = max(1e-4, 4 * epsilon)
    return Tolerance(epsilon, loose, loose, loose, 10 * epsilon)


# Entries that are looked at to find a cause: optimizers treat each entry alike, but for
# norms, which are taken of all.
_ENTRIES = 1 << 14


class Forced(NamedTuple):
    """What the two optimizers did, given the same gradients.

    Attributes:
      ours: JAX's steps.
      theirs: PyTorch's.
      apart: (steps, parameters) says where they differ.
      rule: PyTorch's, as its options tell it.
      kind: the name of its class.
      lacking: parameters that PyTorch's optimizer doesn't have.
      skipped: those that have no gradient in PyTorch, and zeros in JAX.
      gradients: the first step at which the gradients differ, the parameter, and by
        what share of its norm.
    """

    ours: Steps
    theirs: Steps
    apart: Array
    rule: Rule
    kind: str
    lacking: set[str]
    skipped: set[str]
    gradients: tuple[int, str, float] | None


def force(
    jax_side: JaxMover,
    torch_side: TorchMover,
    mover: Mover,
    optimizer: Any,
    steps: int,
    tolerance: Tolerance,
) -> Forced:
    """Runs both optimizers with JAX's gradients, and PyTorch's loss beside them."""
    import torch

    ours: list[JaxStep] = []
    theirs: list[tuple[Arrays, Arrays]] = []
    rates: list[dict[str, float]] = []
    norms: list[float] = []
    skipped: set[str] = set()
    differ: tuple[int, str, float] | None = None
    places: dict[str, Array] = {}
    for step in itertools.islice(jax_steps(jax_side, mover), steps):
        own = torch_gradients(torch_side)
        for name in step.after:
            g, found = step.gradients[name], own[name]
            if found is None and not np.any(g):
                skipped.add(name)  # PyTorch's optimizers pass it over
                continue
            off = norm(g if found is None else g - found)
            close = tolerance.gradient * norm(g) + tolerance.cancelled * step.norm
            share = off / (norm(g) or 1.0)
            if not off <= close and differ is None:
                differ = len(ours) + 1, name, share
            elif not off <= close and differ and differ[0] == len(ours) + 1:
                differ = max(differ, (len(ours) + 1, name, share), key=lambda d: d[2])
            parameter = torch_side.parameters[name]
            parameter.grad = torch.from_numpy(np.array(g)).to(parameter)
        places = places or _places(step)
        norms.append(step.norm)
        groups = names_of(torch_side, optimizer)
        rates.append({name: float(group["lr"]) for name, group in groups.items()})
        before = torch_values(torch_side)
        optimizer.step()
        after = torch_values(torch_side)
        some = [_some(arrays, places) for arrays in step[2:]]
        ours.append(JaxStep(step.loss, step.norm, *some))
        theirs.append((_some(before, places), _some(after, places)))
    gradients = [step.gradients for step in ours]
    seen = _seen(gradients, norms, tolerance)
    made = [(step.before, step.after) for step in ours]
    jax_made, torch_made = (
        _steps(pairs, gradients, norms, seen, tolerance) for pairs in (made, theirs)
    )
    apart = jax_made.norm(jax_made.moved - torch_made.moved) / torch_made.slack()
    groups = names_of(torch_side, optimizer)
    return Forced(
        ours=jax_made,
        theirs=torch_made,
        # Not so fine as the fit: a learning rate may be rounded.
        apart=~(apart <= tolerance.parted / tolerance.fitted),
        rule=rule_of(optimizer, groups, rates, jax_made),
        kind=type(optimizer).__name__,
        lacking={name for name in jax_made.names if name not in groups},
        skipped=skipped,
        gradients=differ,
    )


def forced_causes(forced: Forced) -> tuple[Cause, ...]:
    """Why the optimizers differ."""
    ours, theirs, differs = forced.ours, forced.theirs, forced.apart.any(0)
    rule, causes = forced.rule, []
    for names, kind, text in (
        (forced.lacking, "missing_gradient", "isn't given {} to train; JAX's is"),
        (
            forced.skipped,
            "weight_decay",
            "passes over {}, which has no gradient (None) in PyTorch; JAX's is given "
            "zeros, and moves it all the same",
        ),
    ):
        hit = np.array([name in names for name in ours.names])
        moved = hit & differs
        if moved.any():
            told = text.format(named(ours.names, moved))
            causes.append(Cause(kind, f"PyTorch's {forced.kind} {told}."))
        held = np.where(ours.spread(hit), ours.spread(~moved), rule.held)
        rule = rule._replace(held=held)
    if not (misfit(ours, rule) <= 1).all():
        causes.extend(find_optimizer_causes(rule, ours))
    elif not causes:
        # JAX's does what PyTorch's options say, and PyTorch's own class does not.
        who = Who(f"PyTorch's {forced.kind}", "JAX's optimizer")
        causes.extend(find_optimizer_causes(rule, theirs, who))
    return tuple(causes)


def _places(step: JaxStep) -> dict[str, Array]:
    """Some entries of each parameter: of those with a gradient, and of all."""
    most = max(16, _ENTRIES // (2 * max(1, len(step.after))))

    def thinned(places: Array) -> Array:
        return places[:: max(1, -(-len(places) // most))]

    return {
        name: np.union1d(
            thinned(np.arange(after.size)),
            thinned(np.flatnonzero(step.gradients[name])),
        )
        for name, after in step.after.items()
    }


def _some(arrays: Mapping[str, Array], places: Mapping[str, Array]) -> Arrays:
    return {name: arrays[name].ravel()[place] for name, place in places.items()}


def _seen(
    gradients: Sequence[Arrays], norms: Sequence[float], tolerance: Tolerance
) -> dict[str, Array]:
    """The entries whose gradient isn't noise: rules that divide by it enlarge that."""
    noise = tolerance.cancelled * max(norms)
    seen = {}
    for name in gradients[0]:
        most = np.max([np.abs(row[name]) for row in gradients], axis=0)
        kept = (most == 0) | ~(most < noise)
        if kept.any():
            seen[name] = kept
    return seen or {name: g == g for name, g in gradients[0].items()}


def _steps(
    made: Sequence[tuple[Arrays, Arrays]],
    gradients: Sequence[Arrays],
    norms: Sequence[float],
    seen: Mapping[str, Array],
    tolerance: Tolerance,
) -> Steps:
    def flat(rows: Sequence[Arrays]) -> Array:
        parts = [[row[name][kept] for name, kept in seen.items()] for row in rows]
        return np.stack([np.concatenate(row) for row in parts]).astype(np.float64)

    before, after = (flat([pair[side] for pair in made]) for side in (0, 1))
    sizes = [int(kept.sum()) for kept in seen.values()]
    return Steps(
        names=tuple(seen),
        first=np.cumsum([0, *sizes[:-1]]),
        before=before,
        gradients=flat(gradients),
        moved=after - before,
        norms=np.array(norms),
        noise=tolerance.fitted,
        epsilon=tolerance.epsilon,
    )
