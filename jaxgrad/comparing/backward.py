"""Why gradients differ where the values don't: what stops them, or scales them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgrad.causes import Cause, find_cause
from jaxgrad.comparing.layouts import gathered
from jaxgrad.comparing.links import Link, Measure
from jaxgrad.comparing.sides import Both, compare_all
from jaxgrad.comparing.torch_side import Rewrite, line_text, uncut
from jaxgrad.equations import Place

Array = npt.NDArray[Any]
Wrong = Callable[[Link, Measure], bool]

# Of large gradients so many numbers are looked at for a common factor.
_SAMPLE = 4096
# A leaf that is larger is not searched for transpositions and the like.
_LARGE = 4_000_000
# So many `stop_gradient`s, or lines with a `detach`, are tried one by one.
_TRIES = 24


class Blame(NamedTuple):
    """A cause, and the links whose difference it explains, by place."""

    cause: Cause
    links: tuple[int, ...]


class _State(NamedTuple):
    """Gradients on either side, and which links still differ."""

    ours: Mapping[str, Array]
    theirs: Mapping[str, Array | None]
    wrong: tuple[int, ...]


class Search:
    """Looks for what makes gradients differ.

    Args:
      both: the two sides, whose forward passes agree with the rewrites.
      links: what is compared.
      rewrites: the calls of PyTorch's that are changed.
      theirs: PyTorch's gradients with those, of frozen parameters too.
      is_wrong: says of a link's measure if it's more than rounding.
      counts: sizes that a factor may come from.
      values_agree: whether the forward passes agree; else no gradient tells of itself.
    """

    def __init__(
        self,
        both: Both,
        links: Sequence[Link],
        rewrites: Mapping[int, Rewrite],
        theirs: Mapping[str, Array | None],
        is_wrong: Wrong,
        counts: Mapping[str, int],
        *,
        values_agree: bool,
    ) -> None:
        self._values_agree = values_agree
        self.both, self.links, self.rewrites = both, links, dict(rewrites)
        self.is_wrong, self.counts = is_wrong, counts
        self.blames: list[Blame] = []
        self._thawed: set[str] = set()
        self.state = self._state(both.values.gradients, theirs)

    def _state(
        self, ours: Mapping[str, Array], theirs: Mapping[str, Array | None]
    ) -> _State:
        shown = self.both.model.shown(theirs, self._thawed)
        measures = compare_all(self.links, ours, shown)
        pairs = enumerate(zip(self.links, measures, strict=True))
        wrong = [i for i, (link, m) in pairs if self.is_wrong(link, m)]
        return _State(ours, theirs, tuple(wrong))

    def run(self) -> list[Blame]:
        """The causes, in the order in which they were found."""
        for step in (self._frozen, self._cuts, self._stops, self._factor):
            if self.state.wrong:
                step()
        if self.state.wrong and self._values_agree:
            self._each()
        elif self.state.wrong:
            text = "What is left of the difference no usual mistake explains."
            self.blames.append(Blame(Cause("unknown", text), self.state.wrong))
        return self.blames

    def _take(self, cause: Cause, after: _State) -> bool:
        """Takes a cause, if with what it says fewer gradients differ."""
        explained = set(self.state.wrong) - set(after.wrong)
        if not explained or set(after.wrong) - set(self.state.wrong):
            return False
        self.blames.append(Blame(cause, tuple(sorted(explained))))
        self.state = after
        return True

    def _frozen(self) -> None:
        """Thaws the parameters that PyTorch doesn't train."""
        names = {self.links[i].name for i in self.state.wrong}
        for name in sorted(names & self.both.model.frozen):
            self._thawed.add(name)
            after = self._state(self.state.ours, self.state.theirs)
            text = (
                f"PyTorch's `{name}` is frozen (requires_grad=False), and has no "
                "gradient; JAX's has one."
            )
            if not self._take(Cause("missing_gradient", text), after):
                self._thawed.discard(name)

    def _cuts(self) -> None:
        """Lets gradients through PyTorch's `detach` and `no_grad`."""
        places: dict[Place, list[int]] = {}
        for number, place in self.both.run.cuts.items():
            places.setdefault(place, []).append(number)
        for numbers, text in _one_by_one(places, "detach, no_grad or padding_idx"):
            trial = {**self.rewrites, **dict.fromkeys(numbers, uncut)}
            try:
                run = self.both.model.run(trial)
                theirs = self.both.model.gradients(run)
            except (RuntimeError, ValueError, TypeError):
                continue
            said = (
                f"PyTorch stops the gradient{text}, and JAX doesn't: with the gradient "
                "let through there, the two agree."
            )
            after = self._state(self.state.ours, theirs)
            if self._take(Cause("missing_gradient", said), after):
                self.rewrites = trial
                if not self.state.wrong:
                    return

    def _stops(self) -> None:
        """Lets gradients through JAX's `stop_gradient`."""
        places: dict[Place, list[Place]] = {}
        for place in self.both.traced.stops():
            places[place] = [place]
        for stops, text in _one_by_one(places, "stop_gradient"):
            ours = self.both.traced.through(stops)().gradients
            said = (
                f"JAX stops the gradient{text}, and PyTorch doesn't: with the gradient "
                "let through there, the two agree."
            )
            after = self._state(ours, self.state.theirs)
            taken = self._take(Cause("missing_gradient", said), after)
            if taken and not self.state.wrong:
                return

    def _sample(self, place: int) -> tuple[Array, Array] | None:
        both = self._blocks(place)
        if both is None:
            return None
        ours, theirs = (x.reshape(-1)[:: max(1, x.size // _SAMPLE)] for x in both)
        return ours.astype(np.float64), theirs.astype(np.float64)

    def _blocks(self, place: int) -> tuple[Array, Array] | None:
        link = self.links[place]
        theirs = self.state.theirs.get(link.name)
        if link.added or len(link.pieces) != 1 or theirs is None:
            return None
        piece = link.pieces[0]._replace(names=(link.name,))
        ours = np.asarray(self.state.ours[link.path][piece.block])
        return ours, gathered(piece, {link.name: theirs})

    def _factor(self) -> None:
        """One factor in all gradients: of the loss, or of what flows into it."""
        samples = [self._sample(place) for place in self.state.wrong]
        known = [pair for pair in samples if pair is not None]
        if len(known) < 2 or len(known) < len(samples):
            return
        cause = cause_of_factor(known, self.counts)
        if cause is not None:
            self.blames.append(Blame(cause, self.state.wrong))
            self.state = self.state._replace(wrong=())

    def _each(self) -> None:
        """The simplest cause of each gradient that still differs."""
        blocks = {p: self._blocks(p) for p in self.state.wrong}
        names = {p: self.links[p].path for p in self.state.wrong}
        for place in self.state.wrong:
            pair = blocks[place]
            link = self.links[place]
            if self.state.theirs.get(link.name) is None:
                text = (
                    f"PyTorch's loss doesn't depend on `{link.name}`, JAX's does on "
                    f"`{link.path}`."
                )
                cause = Cause("missing_gradient", text)
            elif pair is None or pair[0].size > _LARGE:
                cause = Cause("unknown", f"The gradients of `{link.path}` differ.")
            else:
                others = [
                    (names[p], b) for p, b in blocks.items()
                    if p != place and b is not None and b[0].size <= _LARGE
                ]  # fmt: skip
                cause = _simplest(link, pair, others, self.counts)
            self.blames.append(Blame(cause, (place,)))


def _one_by_one(
    places: Mapping[Place, Sequence[Any]], what: str
) -> Iterator[tuple[list[Any], str]]:
    """Each line's places alone, then all of them together."""
    for place, numbers in list(places.items())[:_TRIES]:
        where = f" at {line_text(place)}" if place.line else ""
        in_what = f" in {place.function}" if place.function.isidentifier() else ""
        yield list(numbers), f"{where}{in_what} ({what})"
    if len(places) > 1:
        every = [number for numbers in places.values() for number in numbers]
        yield every, f" at {len(places)} lines ({what})"


def cause_of_factor(
    samples: Sequence[tuple[Array, Array]], counts: Mapping[str, int]
) -> Cause | None:
    """The one factor between all pairs of gradients, if there is one."""
    ours = np.concatenate([a / (np.linalg.norm(b) or 1) for a, b in samples])
    theirs = np.concatenate([b / (np.linalg.norm(b) or 1) for _, b in samples])
    try:
        cause = find_cause("every parameter", ours, theirs, counts=counts, noise=1e-5)
    except ValueError:
        return None
    if cause.kind not in ("factor", "sign"):
        return None
    return _named(cause)


def _named(cause: Cause) -> Cause:
    """A cause of `causes.py`, in this comparison's words."""
    kind = {"zero": "missing_gradient"}.get(cause.kind, cause.kind)
    if "where the loss takes the" in cause.text:
        kind = "reduction"
    text = cause.text.replace("The gradient of", "JAX's gradient of")
    return Cause(kind, text.replace("where the loss takes", "where PyTorch takes"))


def _simplest(
    link: Link,
    pair: tuple[Array, Array],
    others: Sequence[tuple[str, tuple[Array, Array]]],
    counts: Mapping[str, int],
) -> Cause:
    ours, theirs = (x.astype(np.float64) for x in pair)
    try:
        cause = find_cause(
            link.path,
            ours,
            theirs,
            counts=counts,
            other_claimed={name: a.astype(np.float64) for name, (a, _) in others},
            other_reference={name: b.astype(np.float64) for name, (_, b) in others},
            noise=1e-5,
        )
    except ValueError as error:
        return Cause("unknown", str(error))
    return _named(cause)
