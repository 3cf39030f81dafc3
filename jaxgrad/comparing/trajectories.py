"""Do the optimizers of both sides move the parameters alike, and if not, why?

Two runs, JAX's and PyTorch's, go side by side. Where they part, PyTorch's optimizer is
run again with JAX's gradients, so that it answers for nothing but itself: if it then
moves as JAX's does, the gradients differ, or rounding has grown.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgrad.causes import Cause
from jaxgrad.comparing.optimizer_options import Who, named
from jaxgrad.comparing.optimizers import find_optimizer_causes, misfit
from jaxgrad.comparing.update_rules import Rule, Steps, rule_of
from jaxgrad.pytrees import PyTree
from jaxgrad.training import _rule as update_rule

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

LEARNING_RATE = 0.01
"""That of the three optimizers that run where none is given."""


class JaxSide(NamedTuple):
    """A loss in JAX.

    Attributes:
      start: the trained leaves, by path.
      value_and_grad: leaves to the loss and its gradients, by path.
      unflatten: leaves to the pytree that an optimizer is given, with `None` for what
        isn't trained.
      flatten: the way back.
      to_torch: leaves to PyTorch's parameters, by name. What it leaves out isn't
        compared.
      gradients_to_torch: the same for gradients.
    """

    start: Mapping[str, Array]
    value_and_grad: Callable[[Arrays], tuple[Any, Mapping[str, Any]]]
    unflatten: Callable[[dict[str, Any]], PyTree]
    flatten: Callable[[PyTree], Mapping[str, Any]]
    to_torch: Callable[[Arrays], Arrays]
    gradients_to_torch: Callable[[Arrays], Arrays]


class TorchSide(NamedTuple):
    """A loss in PyTorch.

    Attributes:
      start: the values that the parameters begin with, by name.
      parameters: the module's own, which are moved; the caller puts them back.
      loss: the loss where they stand, a scalar with its graph; the same each time.
    """

    start: Mapping[str, Array]
    parameters: Mapping[str, Any]
    loss: Callable[[], Any]


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
    jax_side: JaxSide,
    torch_side: TorchSide,
    *,
    steps: int,
    optimizer: Any = None,
    torch_optimizer: Callable[[list[Any]], Any] | None = None,
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
    if optimizer is None:
        import optax
        import torch

        movers = {"jaxgrad.sgd_update": None, "optax": optax.sgd(LEARNING_RATE)}

        make = functools.partial(torch.optim.SGD, lr=LEARNING_RATE)
    else:
        movers = {"optax": optimizer}
        assert torch_optimizer is not None
        make = torch_optimizer
    double = all(np.dtype(leaf.dtype).itemsize > 4 for leaf in jax_side.start.values())
    run = _Run(jax_side, torch_side, make, steps, _TOLERANCES[double])
    with jax.enable_x64(True) if double else nullcontext():
        return run.compare(movers)


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


class _Tolerance(NamedTuple):
    """What rounding explains.

    In float32 an optimizer's own arithmetic errs by up to 3e-5 of a movement: that is
    half of what rounding does to the 1 - 0.999 of Adam's first step. In float64 a
    learning rate that was rounded to float32 is off by 2e-8. Gradients err by about
    1e-6 of their norm in float32, and a parameter's whose terms cancel by so much of
    the whole gradient's.
    """

    epsilon: float
    parted: float
    """Of a step's movement, between two runs."""
    fitted: float
    """Of a step's movement, between two rules given the same gradients."""
    gradient: float
    """Of the gradient of a parameter."""
    cancelled: float
    """Of the whole gradient."""


_TOLERANCES = {
    True: _Tolerance(2.3e-16, 1e-6, 1e-7, 1e-6, 1e-12),
    False: _Tolerance(1.2e-7, 1e-4, 1e-4, 1e-4, 1e-5),
}
# Entries of each parameter that are looked at to find a cause: optimizers treat each
# entry alike, but for norms, which are taken of all.
_ENTRIES = 1 << 17


class _Step(NamedTuple):
    """One step of JAX's: arrays by PyTorch's names, but for the leaves' gradients."""

    loss: float
    before: Arrays
    gradients: Arrays
    after: Arrays


class _Parted(NamedTuple):
    """How far two runs are from each other after a step, per parameter."""

    since_start: dict[str, float]
    this_step: dict[str, float]
    beyond: bool
    """Rounding doesn't explain it."""


class _Run(NamedTuple):
    """The two sides, and how to move them."""

    jax: JaxSide
    torch: TorchSide
    make: Callable[[list[Any]], Any]
    steps: int
    tolerance: _Tolerance

    def compare(self, movers: Mapping[str, Any]) -> Trajectory:
        optimizer = self.made()
        runs = {name: self.jax_run(mover) for name, mover in movers.items()}
        losses: dict[str, list[float]] = {name: [] for name in (*movers, "torch")}
        parted: dict[str, list[_Parted]] = {name: [] for name in movers}
        left_over: list[str] = []
        finite = True
        fresh = copy.deepcopy(optimizer.state_dict())
        now = self.values()
        for torch_step in self.torch_run(optimizer):
            before, now = now, self.values()
            losses["torch"].append(torch_step.loss)
            left_over = left_over or torch_step.left_over
            seen = _finite(torch_step.loss, now)
            ends = [not seen]
            for name, run in runs.items():
                step = next(run)
                losses[name].append(step.loss)
                begin = self.torch.start
                parted[name].append(self.parted(step, begin, before, now))
                ends.append(_finite(step.loss, step.after) != seen)
                finite = finite and seen and not ends[-1]
            if any(ends):
                break
        made = len(losses["torch"])
        told = {name: tuple(values) for name, values in losses.items()}
        name, first = _first(parted)
        if first is None:
            last = parted[name][-1] if made else _Parted({}, {}, False)
            worst = _worst(last.since_start)
            error, step_error = _errors(last, worst)
            return Trajectory(True, made, told, None, worst, error, step_error, ())
        usable = made - (not finite)
        verdict = self.why(movers[name], usable, optimizer, fresh, left_over)
        if verdict is None and usable < made:
            text = "After the last step only one side's numbers are finite."
            verdict = made, None, (Cause("unknown", text),)
        if verdict is None:
            worst = _worst(parted[name][-1].since_start)
            error, step_error = _errors(parted[name][-1], worst)
            return Trajectory(True, made, told, None, worst, error, step_error, ())
        step_made, worst, causes = verdict
        there = parted[name][step_made - 1]
        worst = worst or _worst(there.this_step)
        error, step_error = _errors(there, worst)
        return Trajectory(
            False, made, told, step_made, worst, error, step_error, causes
        )

    def made(self) -> Any:
        """PyTorch's optimizer, on the parameters where they begin."""
        import torch

        with torch.no_grad():
            for name, parameter in self.torch.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(self.torch.start[name])))
                parameter.grad = None
        optimizer = self.make(list(self.torch.parameters.values()))
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(
                "torch_optimizer must return a torch.optim.Optimizer, and returned a "
                f"{type(optimizer).__name__}."
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        needs = closure is not None and closure.default is inspect.Parameter.empty
        if needs or isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{type(optimizer).__name__} evaluates the loss by itself, through a "
                "closure: its steps can't be compared with those of a gradient."
            )
        return optimizer

    def values(self) -> Arrays:
        """PyTorch's parameters where they stand: copies."""
        parameters = self.torch.parameters.items()
        return {name: p.detach().cpu().numpy().copy() for name, p in parameters}

    def gradients(self) -> dict[str, Array | None]:
        """What stands in PyTorch's `grad`: copies."""
        return {
            name: None
            if p.grad is None
            else (p.grad.to_dense() if p.grad.is_sparse else p.grad).numpy().copy()
            for name, p in self.torch.parameters.items()
        }

    def jax_run(self, optimizer: Any) -> Iterator[_Step]:
        """JAX's steps; `None` is `jaxgrad.sgd_update`."""
        side = self.jax
        init, update = update_rule(None, optimizer)

        def no_search(_: PyTree) -> Any:
            raise ValueError(
                "The optimizer evaluates the loss by itself (a line search): its steps "
                "can't be compared with those of a gradient."
            )

        def step(params: PyTree, grads: PyTree, state: PyTree, value: Any) -> Any:
            return update(params, grads, state, LEARNING_RATE, value, no_search)

        params = side.unflatten({k: jnp.asarray(v) for k, v in side.start.items()})
        state = init(params)
        compiled: Any = jax.jit(step)
        leaves = {path: np.asarray(v) for path, v in side.flatten(params).items()}
        before = side.to_torch(leaves)
        for _ in range(self.steps):
            loss, found = side.value_and_grad(leaves)
            gradients = {path: np.asarray(g) for path, g in found.items()}
            grads = side.unflatten({k: jnp.asarray(g) for k, g in gradients.items()})
            given = params, grads, state, jnp.asarray(loss)
            try:
                params, state = compiled(*given)
            except jax.errors.JAXTypeError:  # it looks at values, as in `if step > 10`
                compiled = step
                params, state = compiled(*given)
            leaves = {path: np.asarray(v) for path, v in side.flatten(params).items()}
            after = side.to_torch(leaves)
            yield _Step(float(loss), before, side.gradients_to_torch(gradients), after)
            before = after

    def torch_run(self, optimizer: Any) -> Iterator[_TorchStep]:
        """PyTorch's steps, as a person writes them."""
        for _ in range(self.steps):
            optimizer.zero_grad()
            held = {id(p) for g in optimizer.param_groups for p in g["params"]}
            left_over = [
                name
                for name, p in self.torch.parameters.items()
                if id(p) in held and p.grad is not None and bool((p.grad != 0).any())
            ]
            loss = self.torch.loss()
            loss.backward()
            optimizer.step()
            yield _TorchStep(float(loss.detach()), left_over)

    def parted(self, step: _Step, start: Any, before: Arrays, now: Arrays) -> _Parted:
        """Compares where the two sides are, and how they came there."""
        since, this, beyond = {}, {}, False
        for name in step.after:
            ours = step.after[name] - step.before[name]
            theirs = now[name] - before[name]
            off, size = _norm(ours - theirs), _norm(theirs)
            stored = 4 * self.tolerance.epsilon * _norm(now[name])
            this[name] = _share(off, size)
            whole = now[name] - start[name]
            # As a difference of movements: both sides began alike.
            since[name] = _share(_norm(step.after[name] - now[name]), _norm(whole))
            beyond |= not off <= self.tolerance.parted * size + stored
        return _Parted(since, this, beyond)

    def why(
        self,
        mover: Any,
        steps: int,
        optimizer: Any,
        fresh: Any,
        left_over: list[str],
    ) -> tuple[int, str | None, tuple[Cause, ...]] | None:
        """The step at which they part, the parameter, and the causes.

        `None` if rounding explains it.
        """
        if not steps:
            return None
        again = self.made()
        if again is optimizer:
            again.load_state_dict(fresh)
        forced = self._replace(steps=steps).forced(mover, again)
        ours, theirs = forced.steps
        tolerance = self.tolerance
        differs = misfit_of(ours, theirs) > tolerance.parted / tolerance.fitted
        differs |= ~np.isfinite(misfit_of(ours, theirs))
        if differs.any():
            step = int(np.flatnonzero(differs.any(1))[0])
            shares = misfit_of(ours, theirs)[step]
            worst = ours.names[int(np.argmax(shares))]
            return step + 1, worst, _causes(forced, np.asarray(differs.any(0)))
        if left_over:
            name = f"PyTorch's {type(again).__name__}.zero_grad"
            text = (
                f"{name} leaves the gradients as they are (`{left_over[0]}`), so that "
                "each step is given the sum of all so far; the optimizers agree, given "
                "the same gradients."
            )
            return 2, None, (Cause("accumulated", text),)
        if forced.gradients is not None:
            step, worst, share = forced.gradients
            when = "before the first step" if step == 1 else f"at step {step}"
            why = "" if step == 1 else ", where the parameters are the same"
            text = (
                f"The gradients differ {when}{why} (that of `{worst}` by {share:.2g} "
                "of its norm). The optimizers agree, given the same gradients."
            )
            return step, worst, (Cause("gradients", text),)
        return None

    def forced(self, mover: Any, optimizer: Any) -> _Forced:
        """Runs PyTorch's optimizer with JAX's gradients."""
        import torch

        parameters = self.torch.parameters
        names = {id(p): name for name, p in parameters.items()}
        tolerance = self.tolerance
        ours: list[_Step] = []
        theirs: list[tuple[Arrays, Arrays]] = []
        rates, norms = [], []
        skipped: set[str] = set()
        differ: tuple[int, str, float] | None = None
        places: dict[str, Array] = {}
        for count, step in enumerate(self.jax_run(mover), 1):
            for p in parameters.values():
                p.grad = None
            self.torch.loss().backward()
            own = self.gradients()
            whole = float(np.sqrt(sum(_norm(g) ** 2 for g in step.gradients.values())))
            for name, g in step.gradients.items():
                if name not in step.after:
                    continue
                found = own[name]
                off = _norm(g if found is None else g - found)
                close = tolerance.gradient * _norm(g) + tolerance.cancelled * whole
                share = _share(off, _norm(g))
                first = differ is None or (differ[0] == count and differ[2] < share)
                if first and not off <= close:
                    differ = count, name, share
                if found is None and not np.any(g):
                    skipped.add(name)  # PyTorch's optimizers pass it over
                else:
                    given = torch.from_numpy(np.array(g))
                    parameters[name].grad = given.to(parameters[name])
            if not places:
                places = _places(step)
            norms.append(whole)
            rates.append(
                {
                    names[id(p)]: float(group["lr"])
                    for group in optimizer.param_groups
                    for p in group["params"]
                    if id(p) in names
                }
            )
            before = self.values()
            optimizer.step()
            after = self.values()
            ours.append(_Step(step.loss, *(_some(a, places) for a in step[1:])))
            theirs.append((_some(before, places), _some(after, places)))
        gradients = [step.gradients for step in ours]
        made = [(step.before, step.after) for step in ours]
        shapes = {name: np.ndim(self.torch.start[name]) for name in places}
        both = tuple(
            _steps(pairs, gradients, norms, shapes, tolerance)
            for pairs in (made, theirs)
        )
        rule = rule_of(optimizer, names, rates, both[0])
        lacking = {name for name in places if not any(name in rate for rate in rates)}
        kind = type(optimizer).__name__
        return _Forced((both[0], both[1]), rule, kind, lacking, skipped, differ)


class _TorchStep(NamedTuple):
    loss: float
    left_over: list[str]
    """Parameters whose gradient wasn't zeroed."""


class _Forced(NamedTuple):
    """What the two optimizers did, given the same gradients.

    Attributes:
      steps: JAX's, and PyTorch's.
      rule: PyTorch's, as its options tell it.
      kind: the name of its class.
      lacking: parameters that PyTorch's optimizer doesn't have.
      skipped: those that have no gradient in PyTorch, and zeros in JAX.
      gradients: the first step at which the gradients differ, the parameter, and by
        what share of its norm.
    """

    steps: tuple[Steps, Steps]
    rule: Rule
    kind: str
    lacking: set[str]
    skipped: set[str]
    gradients: tuple[int, str, float] | None


def misfit_of(ours: Steps, theirs: Steps) -> Array:
    """(steps, parameters): how far two movements are apart, in units of rounding."""
    return np.asarray(ours.norm(ours.moved - theirs.moved) / theirs.slack())


def _causes(forced: _Forced, differs: Array) -> tuple[Cause, ...]:
    ours, theirs = forced.steps
    rule, causes = forced.rule, []
    for names, kind, text in (
        (forced.lacking, "missing_gradient", "isn't given {} to train; JAX's is"),
        (
            forced.skipped,
            "weight_decay",
            "passes over {}, which has no gradient (None) in PyTorch; JAX's is given "
            "zeros, and decays or moves it all the same",
        ),
    ):
        hit = np.array([name in names for name in ours.names])
        if (hit & differs).any():
            told = text.format(named(ours.names, hit & differs))
            causes.append(Cause(kind, f"PyTorch's {forced.kind} {told}."))
        entries = ours.spread(hit)
        rule = rule._replace(held=np.where(entries, ~(hit & differs).any(), rule.held))
    if (misfit(ours, rule) <= 1).all():
        if causes:
            return tuple(causes)
        # JAX's does what PyTorch's options say, and PyTorch's doesn't.
        who = Who(f"PyTorch's {forced.kind}", "what its options say, as JAX's does")
        return find_optimizer_causes(rule, theirs, who)
    return (*causes, *find_optimizer_causes(rule, ours))


def _places(step: _Step) -> dict[str, Array]:
    """Some entries of each parameter: of those with a gradient, and of all."""
    most = max(16, _ENTRIES // (2 * max(1, len(step.after))))

    def some(places: Array) -> Array:
        return places[:: max(1, -(-len(places) // most))]

    return {
        name: np.union1d(
            some(np.arange(after.size)), some(np.flatnonzero(step.gradients[name]))
        )
        for name, after in step.after.items()
        if after.size
    }


def _some(arrays: Mapping[str, Array], places: Mapping[str, Array]) -> Arrays:
    return {name: arrays[name].ravel()[place] for name, place in places.items()}


def _steps(
    made: Sequence[tuple[Arrays, Arrays]],
    gradients: Sequence[Arrays],
    norms: Sequence[float],
    axes: Mapping[str, int],
    tolerance: _Tolerance,
) -> Steps:
    names = tuple(axes)

    def flat(arrays: Sequence[Arrays]) -> Array:
        rows = [np.concatenate([row[name] for name in names]) for row in arrays]
        return np.stack(rows).astype(np.float64)

    before, after = (flat([pair[side] for pair in made]) for side in (0, 1))
    sizes = [len(made[0][0][name]) for name in names]
    return Steps(
        names=names,
        first=np.cumsum([0, *sizes[:-1]]),
        before=before,
        gradients=flat(gradients),
        moved=after - before,
        norms=np.array(norms),
        noise=tolerance.fitted,
        epsilon=tolerance.epsilon,
    )


def _first(parted: Mapping[str, list[_Parted]]) -> tuple[str, int | None]:
    """Which of JAX's runs parts first from PyTorch's, and at which step."""
    steps = {
        name: next((i for i, p in enumerate(each, 1) if p.beyond), None)
        for name, each in parted.items()
    }
    name = min(steps, key=lambda run: steps[run] or np.inf)
    return name, steps[name]


def _worst(errors: Mapping[str, float]) -> str | None:
    return max(errors, key=lambda name: errors[name], default=None)


def _errors(parted: _Parted, name: str | None) -> tuple[float, float]:
    if name is None:
        return 0.0, 0.0
    return parted.since_start[name], parted.this_step[name]


def _finite(loss: float, arrays: Mapping[str, Array]) -> bool:
    return bool(np.isfinite(loss)) and all(
        np.isfinite(array).all() for array in arrays.values()
    )


def _norm(array: Array) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))


def _share(off: float, size: float) -> float:
    if off == 0:
        return 0.0
    return off / size if size else float("inf")
