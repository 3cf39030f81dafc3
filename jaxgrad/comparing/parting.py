"""Where two forward passes part, and why: hypotheses, tested by running PyTorch."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.forward import Found, Pool
from jaxgrad.comparing.hypotheses import Context, Hypothesis, hypotheses, rewrite
from jaxgrad.comparing.relations import related
from jaxgrad.comparing.torch_side import Call, Rewrite, Run, array_of, name_of

Array = npt.NDArray[Any]

# So many causes are looked for, one after the other; so many calls are looked at for
# each; and so many runs of PyTorch are made to test those whose result tells nothing,
# and so many to test parameters in each other's place.
_ROUNDS, _CALLS, _BLIND, _PAIRS = 12, 40, 12, 64
# How many calls that use a changed one's result are made again, to find it in JAX.
_AHEAD = 4
# In float64: what a right hypothesis may be off by, and two losses that are the same.
_CLOSELY, _SAME = 1e-7, 1e-9


class Parting(NamedTuple):
    """How far one run of PyTorch is found among JAX's values.

    Attributes:
      found: per record of the run, where it stands in JAX.
      bad: the records on which the loss depends that don't, in order; up to those that
        do. None if the loss itself is JAX's.
      off: the relative difference of the two losses.
    """

    found: list[Found | None]
    bad: list[int]
    off: float


class Runs:
    """Runs of the PyTorch side with some calls changed, against JAX's values."""

    def __init__(
        self,
        run: Callable[[Mapping[int, Rewrite]], Run],
        pool: Pool,
        loss: float,
        tolerance: float,
        *,
        closely: bool,
    ) -> None:
        self._run, self.pool, self.loss = run, pool, loss
        self.tolerance = tolerance
        # What a right hypothesis gives differs by no more than constants in float32 do.
        self.closely = min(tolerance, _CLOSELY) if closely else tolerance
        # A loss may agree by chance to some digits, but not to so many.
        self.same = min(tolerance, _SAME) if closely else tolerance

    def __call__(self, rewrites: Mapping[int, Rewrite]) -> tuple[Run, Parting]:
        """One run, and how far it is found."""
        run = self._run(rewrites)
        return run, self.parting(run)

    def parting(self, run: Run) -> Parting:
        """How far a run is found among JAX's values."""
        found: list[Found | None] = []
        for own, record in enumerate(run.records):
            array = record.array(run.overwritten, own)
            found.append(self.pool.find(array, self.tolerance))
        off = apart(self.loss, float(run.loss.detach()))
        if off <= self.same:
            return Parting(found, [], off)
        last = max(
            (i for i, r in enumerate(run.records) if r.tensor is run.loss), default=None
        )
        if last is None:  # made where PyTorch records nothing: all that's unknown
            return Parting(found, [i for i, f in enumerate(found) if f is None], off)
        bad, stack = {last}, [last]
        while stack:
            for i in run.records[stack.pop()].inputs:
                if found[i] is None and i not in bad:
                    bad.add(i)
                    stack.append(i)
        if len(bad) == 1 and off <= self.tolerance:
            bad = set()  # all that it's made of is JAX's
        return Parting(found, sorted(bad), off)


def apart(one: float, other: float) -> float:
    """The relative difference of two numbers."""
    if one == other or (np.isnan(one) and np.isnan(other)):
        return 0.0
    size = max(abs(one), abs(other))
    off = abs(one - other) / size
    return off if np.isfinite(off) else np.inf


@dataclass(frozen=True, eq=False)
class Reason:
    """A cause of a forward difference, and where.

    Attributes:
      kind: the cause's kind.
      text: for a person, without the place.
      records: the records, of the first run, whose calls it changes.
      parameters: the parameters that those calls are given.
    """

    kind: str
    text: str
    records: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass
class Explained:
    """What explains a forward difference.

    Attributes:
      run: PyTorch's run with the calls changed.
      parting: what is left of the difference then.
      reasons: the causes, in the order in which they were found.
      rewrites: the calls changed, by number.
    """

    run: Run
    parting: Parting
    reasons: list[Reason] = field(default_factory=list)
    rewrites: dict[int, Rewrite] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether nothing is left of the difference."""
        return not self.parting.bad


def explain(runs: Runs, run: Run, parting: Parting, context: Context) -> Explained:
    """Looks for changes of PyTorch's calls by which its forward pass becomes JAX's."""
    done = Explained(run, parting)
    for _ in range(_ROUNDS):
        if not done.parting.bad or not _one_more(runs, done, context):
            break
    if not done.whole:
        _swapped(runs, done, context)
    return done


def _swapped(runs: Runs, done: Explained, context: Context) -> bool:
    """Tries parameters in each other's place: of two modules alike, or of one module.

    Where a call's own result tells nothing, since JAX has both, only used otherwise.
    """
    run = done.run
    for pairs in itertools.islice(exchanges(context.parameters), _PAIRS):
        instead: dict[int, Any] = {}
        for one, two in pairs:
            a, b = context.parameters[one], context.parameters[two]
            instead |= {id(a): b, id(b): a}
        names = {name for pair in pairs for name in pair}
        hit = {r.number for r in run.records if names & set(r.parameters)}
        change = _substituted(instead)
        trial = {**dict.fromkeys(hit, change), **done.rewrites}
        if hit & set(done.rewrites):
            continue
        again, after = runs(trial)
        if not after.bad:
            one, two = pairs[0]
            both = f"`{one}` and `{two}`"
            text = f"uses {both} where JAX has the other of the two"
            if len(pairs) > 1:
                text += f" (and so with {len(pairs) - 1} more of their modules')"
            records = tuple(i for i, r in enumerate(run.records) if r.number in hit)
            used = tuple(sorted(names))
            done.reasons.append(Reason("swapped", text, records, used))
            done.rewrites, done.run, done.parting = trial, again, after
            return True
    return False


def exchanges(parameters: Mapping[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """Pairs of parameters that may have been exchanged: module by module first."""
    inside: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, p in parameters.items():
        parts = name.split(".")
        for count in range(1, len(parts)):
            path, rest = ".".join(parts[:count]), ".".join(parts[count:])
            inside.setdefault(path, {})[rest] = tuple(p.shape)
    for one, two in itertools.combinations(inside, 2):
        apart = not two.startswith(f"{one}.") and not one.startswith(f"{two}.")
        if apart and inside[one] == inside[two]:
            yield [(f"{one}.{rest}", f"{two}.{rest}") for rest in inside[one]]
    for one, two in itertools.combinations(parameters, 2):
        if parameters[one].shape == parameters[two].shape:
            yield [(one, two)]


def _substituted(instead: Mapping[int, Any]) -> Callable[[Call], Call]:
    """The change of a call that is given other tensors."""

    def other(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(other, x))
        return instead.get(id(x), x)

    def change(call: Call) -> Call:
        func, args, kwargs = call
        return func, other(args), {k: other(v) for k, v in kwargs.items()}

    return change


def _one_more(runs: Runs, done: Explained, context: Context) -> bool:
    """Finds one more cause, if there is one."""
    run, parting = done.run, done.parting
    blind: list[tuple[int, Hypothesis]] = []
    for own in parting.bad[:_CALLS]:
        record = run.records[own]
        if record.number in done.rewrites:
            continue
        call = run.calls[record.number]
        tried = itertools.chain(
            hypotheses(call, context), related(run, parting, own, runs.pool)
        )
        for hypothesis in tried:
            if hypothesis.blind:
                blind.append((own, hypothesis))
            elif _fits(runs, run, parting, hypothesis, own) and _accepted(
                runs, done, hypothesis, own, context
            ):
                return True
    return any(
        _accepted(runs, done, hypothesis, own, context)
        for own, hypothesis in blind[:_BLIND]
    )


def _fits(
    runs: Runs, run: Run, parting: Parting, hypothesis: Hypothesis, own: int
) -> bool:
    """Whether the changed call gives what stands among JAX's values.

    Or what is made of it does: JAX may add a bias after the rest of a sum, so that a
    layer's own result never stands alone.
    """
    import torch

    record = run.records[own]
    places = [parting.found[i] for i in record.inputs]
    known = {place.value for place in places if place is not None}

    def found(x: Any) -> bool:
        place = runs.pool.find(array_of(x), runs.closely)
        return place is not None and place.value not in known

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = _tried(hypothesis.change, run.calls[record.number])
        if tensors is None:
            return False
        if record.tensor is run.loss:
            value = tensors[0]
            return not value.dim() and apart(runs.loss, float(value)) <= runs.closely
        # Of a recurrent layer the last state may stand in JAX, and not all of them.
        if any(map(found, tensors)):
            return True
        instead = {id(record.tensor): tensors[0]}
        changed, ahead = {own}, 0
        for i in range(own + 1, len(run.records)):
            later = run.records[i]
            if not changed & set(later.inputs):
                continue
            ahead += 1
            after = _tried(_substituted(instead), run.calls[later.number])
            if after is None or ahead > _AHEAD:
                return False
            if later.tensor is run.loss:
                close = apart(runs.loss, float(after[0].reshape(-1)[0]))
                return close <= runs.closely
            if parting.found[i] is None and found(after[0]):
                return True
            instead[id(later.tensor)] = after[0]
            changed.add(i)
    return False


def _tried(change: Callable[[Any], Any], call: Call) -> list[Any] | None:
    """The tensors that a changed call gives; `None` where it can't be made."""
    import torch

    try:
        func, args, kwargs = change(call)
        name = name_of(func)
        if name.endswith("_") or kwargs.get("inplace"):
            args = (args[0].clone(), *args[1:])
        out = func(*args, **kwargs)
    except Exception:
        return None  # shapes that don't fit, for instance: JAX can't do that either
    tensors = [out] if isinstance(out, torch.Tensor) else list(out)
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    return tensors or None


def _accepted(
    runs: Runs, done: Explained, hypothesis: Hypothesis, own: int, context: Context
) -> bool:
    """Tests a hypothesis by a whole run, here, and wherever else it applies too."""
    run, parting = done.run, done.parting
    record = run.records[own]
    change: Rewrite = rewrite(hypothesis.text, context)
    if hypothesis.once:
        change = hypothesis.change
    alike = [
        number
        for number, call in run.calls.items()
        if number >= record.number
        and not hypothesis.once
        and number not in done.rewrites
        and name_of(call[0]) == record.function
        and any(h.text == hypothesis.text for h in hypotheses(call, context))
    ]
    best = None
    for numbers in [alike, [record.number]] if len(alike) > 1 else [[record.number]]:
        trial = {**done.rewrites, **dict.fromkeys(numbers, change)}
        try:
            again, after = runs(trial)
        except Exception:
            continue
        rank = _rank(again, after)
        unsure = hypothesis.blind or hypothesis.once
        if unsure and not _onward(run, parting, after, own):
            continue
        if rank < _rank(run, parting) and (best is None or rank < best[0]):
            best = rank, numbers, trial, again, after
        if not after.bad:
            break
    if best is None:
        return False
    _, numbers, trial, again, after = best
    hit = [i for i, r in enumerate(run.records) if r.number in numbers]
    if hypothesis.at is not None:
        hit = [hypothesis.at]
    used = tuple(dict.fromkeys(p for i in hit for p in run.records[i].parameters))
    done.reasons.append(Reason(hypothesis.kind, hypothesis.text, tuple(hit), used))
    done.rewrites, done.run, done.parting = trial, again, after
    return True


def _onward(run: Run, before: Parting, after: Parting, own: int) -> bool:
    """Whether what is made of a record is found, too, since its call was changed."""
    if not after.bad:
        return True
    return any(
        before.found[i] is None and after.found[i] is not None
        for i in range(own + 1, min(len(before.found), len(after.found)))
        if own in run.records[i].inputs
    )


def _rank(run: Run, parting: Parting) -> tuple[int, float]:
    """How good a run is: how late it parts from JAX; the less, the better."""
    if not parting.bad:
        return 0, 0.0
    return len(run.records) - parting.bad[0], float(len(parting.bad))


def counterpart(run: Run, parting: Parting, pool: Pool) -> tuple[int, Found | None]:
    """The record at which two passes part, and the JAX value that is nearest to it.

    It's the first that depends on the parameters, and whose inputs that do are found.
    """
    own = next(
        (i for i in parting.bad if run.records[i].tensor.requires_grad), parting.bad[0]
    )
    return own, pool.near(run.records[own].array(run.overwritten, own))


def line_after(run: Run, parting: Parting, own: int, pool: Pool) -> int | None:
    """The JAX value made right after the last input of a record that is in JAX."""
    places = [parting.found[i] for i in run.records[own].inputs]
    known = [place.value for place in places if place is not None]
    if not known:
        return None
    return min(max(known) + 1, len(pool.made) - 1)


def paddings_of(nodes: Sequence[Any]) -> list[tuple[tuple[int, int], ...]]:
    """The explicit paddings of convolutions and pools among equations."""
    found = []
    for eqn in nodes:
        padding = eqn.params.get("padding")
        if eqn.primitive.name.startswith(("conv_general", "reduce_window")) and padding:
            pads = tuple((int(low), int(high)) for low, high in padding)
            if eqn.primitive.name.startswith("conv"):
                found.append(pads)
            else:  # of all axes: batch and channels are the first, or first and last
                found += [pads[1:-1], pads[2:]]
    return list(dict.fromkeys(found))
