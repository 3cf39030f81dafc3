"""Says why two optimizers, given the same gradients, move the parameters differently.

A hypothesis changes an option of one rule, or two of them, and predicts each movement
of the other. Numbers that no list holds are fitted. The simplest that fits is taken: it
leaves no more than rounding explains, of every parameter and at every step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.comparing.trajectories.options import (
    ALGORITHMS,
    WHOLE,
    Changes,
    Family,
    Who,
    explain,
    families,
    from_scale,
    to_scale,
)
from jaxgrad.comparing.trajectories.rules import WRITTEN, Array, Rule, Steps, movements


def misfit(steps: Steps, rule: Rule) -> Array:
    """(steps, parameters): what a rule leaves unexplained, in units of rounding."""
    return _misfit(steps, movements(rule, steps))


def _misfit(steps: Steps, moved: Array) -> Array:
    return np.asarray(steps.norm(steps.moved - moved) / steps.slack())


@np.errstate(all="ignore")  # a wrong hypothesis may overflow
def find_optimizer_causes(
    base: Rule, steps: Steps, who: Who | None = None
) -> tuple[Cause, ...]:
    """Finds what to change of a rule, to predict an optimizer's steps.

    Args:
      base: the rule, which doesn't predict them.
      steps: what the optimizer was given, and what it did.
      who: what the two are called in the text.

    Returns:
      A cause, or two where it takes two changes; `unknown` where none fits.
    """
    who = who or Who()
    search = _Search(base, steps)
    # The simplest first: what has fewer numbers to fit. A schedule has one for a step.
    few = steps.length < 4
    for tier in (
        search.listed(""),
        search.rates("all"),
        search.fitted(""),
        search.rates("parameters", "steps") if few else search.rates("parameters"),
        search.listed("all"),
        search.algorithms(),
        search.fitted("all"),
        search.rates("steps"),
        search.listed("steps"),
        search.pairs(),
    ):
        rule = next(iter(tier), None)
        if rule is not None:
            causes = explain(base, rule, steps, who)
            if steps.length == 1:
                hint = " (Of one step; more of them tell such causes apart.)"
                causes = tuple(Cause(c.kind, c.text + hint) for c in causes)
            return causes
    return (_unknown(base, steps, who),)


def _unknown(base: Rule, steps: Steps, who: Who) -> Cause:
    ours, theirs = steps.moved, movements(base, steps)
    sizes = float(np.linalg.norm(ours)), float(np.linalg.norm(theirs))
    cosine = float(np.vdot(ours, theirs)) / (sizes[0] * sizes[1] or 1.0)
    text = (
        f"{who.ours} and {who.theirs} differ given the same gradients (norms of the "
        f"movements {sizes[0]:.3g} and {sizes[1]:.3g}, cosine {cosine:.3g}), and no "
        "change of one option or two explains it."
    )
    return Cause("unknown", text)


class _Search:
    """The hypotheses on one optimizer's steps; each that fits is a rule."""

    def __init__(self, base: Rule, steps: Steps):
        self.base, self.steps = base, steps
        self.families = [*families(base, steps.length)]
        bad: Array = np.asarray(~(misfit(steps, base) <= 1).all(0))
        everywhere: Array = np.ones_like(bad)
        # Everywhere first: a parameter without a gradient fits almost any rule.
        self.scopes = [everywhere] if bad.all() else [everywhere, bad]
        self.weights = 1 / steps.spread(steps.slack())

    def listed(self, way: str) -> Iterator[Rule]:
        """One change, to a value that people use."""
        for family, scope in itertools.product(self.families, self.scopes):
            yield from self.exact(family.changes, scope, way)

    def rates(self, *ways: str) -> Iterator[Rule]:
        """Other learning rates, and nothing else."""
        for way in ways:
            yield from self.fit_rates(self.base, way)

    def fitted(self, way: str) -> Iterator[Rule]:
        """One change, to the value that fits best."""
        for family, scope in itertools.product(self.families, self.scopes):
            yield from self.fit([family], scope, way)

    def algorithms(self) -> Iterator[Rule]:
        """Another algorithm, as people use it, or with one change."""
        kept = "held", "weight_decay", "decoupled"
        others = [
            other._replace(
                lr=np.ones_like(self.base.lr),
                **{name: getattr(self.base, name) for name in kept},
            )
            for other in ALGORITHMS
            if other.algorithm != self.base.algorithm
        ]
        for other in others:
            yield from self.fit_rates(other, "all")
        for other in others:
            if other.algorithm in WRITTEN:  # PyTorch's own are slow to try
                yield from _Search(other, self.steps).listed("all")

    def pairs(self) -> Iterator[Rule]:
        """Two changes, tried on some entries first."""
        rough, everywhere = self.thinned(), self.scopes[0]
        # The same families, for fewer entries.
        both = zip(rough.families, self.families, strict=True)
        for one, two in itertools.combinations(both, 2):
            if {*one[0].changes[0]} & {*two[0].changes[0]}:
                continue
            few, some = (
                [family._replace(changes=family.changes[:6]) for family in pair]
                for pair in zip(one, two, strict=True)
            )
            if next(rough.fit(few, everywhere), None) is not None:
                yield from self.fit(some, everywhere)

    def exact(
        self, changes: Iterable[Changes], scope: Array, way: str
    ) -> Iterator[Rule]:
        for change in changes:
            rule = self.changed(change, scope)
            if rule is not None:
                yield from self.fit_rates(rule, way)

    def fit(
        self, some: Sequence[Family], scope: Array, way: str = ""
    ) -> Iterator[Rule]:
        """The rule with the free options at their best, if it then fits."""
        free = [family.free for family in some if family.free]
        starts = []
        for choice in itertools.product(*(family.changes for family in some)):
            change = {k: v for part in choice for k, v in part.items()}
            rule = self.changed(change, scope)
            if rule is not None:
                starts.append((self.left(rule, way), change))
        if not starts:
            return
        _, start = min(starts, key=lambda trial: float(np.sum(trial[0] ** 2)))
        if len(some) > 1:
            yield from self.exact([start], scope, way)

        def at(x: Array) -> Changes:
            values = zip(free, x, strict=True)
            return {**start, **{name: from_scale(name, v) for name, v in values}}

        def left(x: Array) -> Array:
            return self.left(self.changed(at(x), scope) or self.base, way)

        if free:
            begin = [to_scale(name, float(np.max(start[name]))) for name in free]
            best = at(_minimum(left, np.array(begin)))
            for digits in (1, 2, 3, 4, 6, 17):
                short = {name: float(f"{best[name]:.{digits}g}") for name in free}
                yield from self.exact([{**best, **short}], scope, way)

    def fit_rates(self, rule: Rule, way: str) -> Iterator[Rule]:
        """The rule at the learning rates that fit best, if it then fits."""
        if way == "steps":  # a rate of 0 has no multiples
            rates = np.broadcast_to(rule.lr, self.steps.moved.shape)
            rule = rule._replace(lr=np.where(rates == 0, rates.max(0), rates))
        moved = movements(rule, self.steps)
        ratios = self.ratios(moved, way)
        if (_misfit(self.steps, moved * ratios) <= 1).all():
            yield rule._replace(lr=rule.lr * ratios) if way else rule

    def left(self, rule: Rule, way: str) -> Array:
        """What a rule leaves unexplained of each entry, in units of rounding."""
        moved = movements(rule, self.steps)
        left = (self.steps.moved - moved * self.ratios(moved, way)) * self.weights
        left = np.nan_to_num(left, nan=1e99, posinf=1e99, neginf=-1e99)
        return np.asarray(np.clip(left, -1e99, 1e99).ravel())

    def ratios(self, moved: Array, way: str) -> Array:
        """How many times as fast the steps are as a rule's: least squares."""
        predicted, actual = moved * self.weights, self.steps.moved * self.weights
        products, squares = predicted * actual, np.square(predicted)
        if way == "all":
            return _over(products.sum(), squares.sum())
        if way == "steps":
            return _over(products.sum(1, keepdims=True), squares.sum(1, keepdims=True))
        if way == "parameters":
            first = self.steps.first
            sums = (np.add.reduceat(s.sum(0), first) for s in (products, squares))
            fits = (_misfit(self.steps, moved) <= 1).all(0)
            return self.steps.spread(np.where(fits, 1, _over(*sums)))
        return np.ones(())

    def changed(self, changes: Changes, scope: Array) -> Rule | None:
        """The rule with a change to some parameters; `None` if it changes nothing."""
        if "held" in changes and (scope.all() or not self.steps.moved.any()):
            return None  # no step at all: its length is 0
        new = {}
        for name, value in changes.items():
            old = getattr(self.base, name)
            if scope.all():
                new[name] = value
            elif name in WHOLE:
                return None
            else:
                new[name] = np.where(self.steps.spread(scope), value, old)
        if all(np.all(new[name] == getattr(self.base, name)) for name in new):
            return None
        return self.base._replace(**new)

    def thinned(self) -> _Search:
        """The same on fewer entries and steps."""
        steps = self.steps.cut(6)
        most = max(8, 2048 // len(steps.names))
        parts = np.split(np.arange(steps.moved.shape[1]), steps.first[1:])
        kept = [part[:: max(1, -(-len(part) // most))] for part in parts]
        entries = np.concatenate(kept)
        thin = steps._replace(
            first=np.cumsum([0, *map(len, kept[:-1])]),
            before=steps.before[:, entries],
            gradients=steps.gradients[:, entries],
            moved=steps.moved[:, entries],
        )

        def some(value: Any) -> Any:
            if np.ndim(value) == 0:
                return value
            return (
                value[: steps.length, entries]
                if np.ndim(value) > 1
                else (value[entries])
            )

        base = Rule._make([self.base[0], *map(some, self.base[1:-1]), self.base[-1]])
        return _Search(base, thin)


def _over(above: Any, below: Any) -> Array:
    """A ratio, which is 1 where nothing was predicted to move."""
    return np.asarray(np.where(below > 0, above, 1) / np.where(below > 0, below, 1))


def _minimum(left: Callable[[Array], Array], x: Array) -> Array:
    """Where a sum of squares is least, near `x`, by Gauss and Newton's steps."""
    now = left(x)
    for count in range(25):
        steps = 1e-6 * np.eye(len(x))
        slopes = np.stack([(left(x + h) - left(x - h)) / 2e-6 for h in steps], 1)
        move = np.linalg.lstsq(slopes, -now, rcond=None)[0]
        for _ in range(8):
            after = left(x + move)
            if np.sum(after**2) < np.sum(now**2):
                break
            move = move / 2
        else:
            return x
        # Near a rule that fits, each step leaves far less than the one before.
        slow = count > 2 and np.sum(after**2) > 0.5 * np.sum(now**2)
        x, now = x + move, after
        if slow or np.abs(move).max() < 1e-12:
            break
    return x
