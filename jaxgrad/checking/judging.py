"""Judges one problem: its leaves, then its custom rules if a leaf is in doubt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.checking.candidates import parts_of, without_rules
from jaxgrad.checking.digits import where_digits_go
from jaxgrad.checking.excusing import excused, fails
from jaxgrad.checking.leaves import Leaf, made_of_leaf, on_host, stays_spread
from jaxgrad.checking.measuring import Claim, Measuring
from jaxgrad.checking.problem import (
    Gradients,
    NativeGradient,
    Problem,
    WideGradient,
    epsilon,
)
from jaxgrad.checking.reference import Reference
from jaxgrad.checking.report import BAD, LeafCheck, RuleCheck
from jaxgrad.checking.rules import check_rules
from jaxgrad.checking.sums import wide
from jaxgrad.checking.verdict import Judge
from jaxgrad.compiling import compile_all
from jaxgrad.equations import Opaque, equations
from jaxgrad.precision import at_highest, findings_of, lowered
from jaxgrad.tables import Finding


@dataclass(frozen=True)
class Options:
    """How to judge: the tolerance, the random directions, the budget."""

    rtol: float
    seed: int
    max_evaluations: int | None


@dataclass(frozen=True)
class Given:
    """A gradient from the user: its values, and its equations if it's a function."""

    values: list[Leaf]
    eps: list[float]
    problem: Callable[[Problem], Problem] | None


@dataclass(frozen=True)
class Judged:
    """What was found on one problem."""

    leaves: list[LeafCheck]
    rules: list[RuleCheck]
    findings: list[Finding]
    forward_mode: str
    evaluations: int


# By this share of themselves parameters are moved, to see what rounding does: some 50
# roundings, so that those in the middle of a computation are seen too.
_NUDGE = 1e-14
# Loops are run on for twice as many steps again: what was left at the tolerance t is
# then t**3, as far as each step takes the same share of it.
_RUN_ON = 2


def judge(
    problem: Problem,
    options: Options,
    *,
    plain: Problem | None = None,
    given: Given | None = None,
    with_rules: bool = True,
) -> Judged:
    """Judges a problem's gradient by the values of `plain`, by default its own loss."""
    plain = plain or problem
    tested = problem
    if given is not None and given.problem is not None:
        tested = given.problem(problem)
    computed = _computed(tested, plain, options)
    findings = list(computed.findings)
    judging = _judging(tested, plain, options, given, computed)
    leaves = judging.leaves()
    if any(eqn.primitive.name == "while" for eqn in equations(plain.loss)):
        leaves = _run_on(judging, leaves, options, computed)
    closed = problem.loss if tested.gradient is None else tested.gradient
    low = lowered(closed, [*problem.values, *problem.fixed])
    findings += findings_of(low)
    if low and tested.gradient is not None and any(map(fails, leaves)):
        again = functools.partial(_judging, tested, plain, options, given)
        after, highest = _at_highest(judging, computed, tested, again)
        leaves = excused(leaves, after, low)
        computed = computed if any(map(fails, after)) else highest
        del highest
    if any(leaf.verdict == "imprecise" and not leaf.cause for leaf in leaves):
        leaves = _with_place(leaves, tested)
    differ = _differ(computed) if given is None else None
    if differ:
        findings.append(_other_value(problem, plain, computed.reference, differ))
    changing = any(finding.kind == "nondeterministic" for finding in findings)
    if changing:
        text = findings[-1].text
        leaves = [replace(leaf, verdict="undecided", text=text) for leaf in leaves]
    forward, finding = _forward_mode(computed, options, len(leaves))
    if finding and not changing:
        findings.append(finding)
    findings += _held_back(plain, computed)
    forward = "none" if changing else forward
    evaluations = computed.reference.evaluations
    doubtful = differ or any(leaf.verdict in BAD for leaf in leaves)
    del judging, computed  # the large arrays, before those of the rules come
    rules: list[RuleCheck] = []
    if with_rules and given is None and doubtful and not changing:
        rules = check_rules(problem, lambda p: _alone(p, options), options.seed)
        leaves = [_with_rule(leaf, rules) for leaf in leaves]
    findings += _not_looked_for(problem, leaves)
    return Judged(leaves, rules, findings, forward, evaluations)


@dataclass(frozen=True)
class _Computed:
    """What was computed once, for all leaves."""

    reference: Reference
    native: Gradients | None
    widely: WideGradient | None
    wide: Gradients | None
    notes: list[str]
    findings: list[Finding]


def _computed(tested: Problem, plain: Problem, options: Options) -> _Computed:
    """The gradient as it is and in float64, and the reference, compiled together."""
    notes: list[str] = []
    findings: list[Finding] = []
    reference = Reference(plain, options.max_evaluations)
    if tested.gradient is None:
        return _Computed(reference, None, None, None, reference.notes, findings)
    natively, widely = NativeGradient(tested), None
    try:
        point = reference.point if plain is tested else None
        widely = WideGradient(tested, options.seed, notes, point)
    except Opaque as error:
        if plain is tested:
            raise
        text = f"{error}".partition(". Pass")[0]
        findings.append(Finding("native", "", f"{text}: judged as it is computed"))
    except Exception:  # an equation that no rule here makes wider
        text = "the gradient can't be computed in float64: judged as it is computed"
        findings.append(Finding("native", "", text))
    programs = [reference.program, natively.program]
    if jax.process_count() == 1:  # several compile in one order, at the first call
        compile_all([*programs, *([widely.program] if widely else [])])
    native, wide = natively(), widely() if widely else None
    if wide:
        with jax.enable_x64(True):
            reference.pulls = on_host(wide.pulls)
    notes += reference.notes
    return _Computed(reference, native, widely, wide, notes, findings)


def _judging(
    tested: Problem,
    plain: Problem,
    options: Options,
    given: Given | None,
    computed: _Computed,
) -> Judge:
    reference, widely, wide = computed.reference, computed.widely, computed.wide

    @functools.cache
    def nudged() -> list[Leaf]:
        assert widely is not None
        return widely(_NUDGE).leaves

    @functools.cache
    def candidates() -> list[list[Leaf]]:
        found = []
        if wide is not None and (given is not None or plain is not tested):
            found.append(wide.leaves)
        for hold in (1, 2) if reference.inner_stops else (1,):
            array = without_rules(plain, reference.pulls, hold)
            if array is not None:
                found.append(array)
        return found

    @functools.cache
    def parts() -> Callable[[int], list[tuple[str, np.ndarray]]]:
        return parts_of(plain, reference.pulls)

    def parts_for(number: int) -> list[tuple[str, np.ndarray]]:
        return parts()(number)

    claim = _claim(tested, computed, given, nudged if widely else None)
    measuring = Measuring(plain, reference, claim, options.seed)
    return Judge(measuring, options.rtol, candidates, _counts(plain), parts_for)


def _other_value(
    problem: Problem,
    plain: Problem,
    reference: Reference,
    values: tuple[float, float],
) -> Finding:
    """Why a loss and what it's compared with have different values."""
    here, other = values
    if plain is not problem:
        text = f"the loss is {other:.8g}, the reference computes {here:.8g}"
        return Finding("value", "", text)
    if _nondeterministic(problem, reference):
        text = (
            "the loss isn't deterministic: traced again, it gave another value. Draw "
            "its randomness from a key in params or args"
        )
        return Finding("nondeterministic", "", text)
    text = (
        f"the loss is {here:.8g}, and the forward part of its gradient gives "
        f"{other:.8g}: a custom rule's `fwd` returns something else than the function"
    )
    return Finding("value", "", text)


def _held_back(plain: Problem, computed: _Computed) -> list[Finding]:
    """What could not be computed wider, or isn't checked."""
    found = [
        Finding(
            "native",
            "",
            f"{note} can't be computed in float64: it keeps its own dtype, and the "
            "reference is coarser for it",
        )
        for note in dict.fromkeys(computed.notes)
    ]
    if any(eqn.primitive.name == "random_gamma" for eqn in equations(plain.loss)):
        text = (
            "a gamma sample is differentiated implicitly, as JAX does: its derivative "
            "is taken from JAX and isn't checked"
        )
        found.append(Finding("implicit", "", text))
    return found


def _forward_mode(
    computed: _Computed, options: Options, leaves: int
) -> tuple[str, Finding | None]:
    """Whether forward mode agrees with reverse mode, along one direction."""
    slopes = computed.wide.slopes if computed.wide else None
    if slopes is None or not np.isfinite(slopes).all():
        return "none", None
    ahead, back = slopes
    # The gradient's parts are scaled to a sum of order 1 per leaf.
    if abs(ahead - back) <= options.rtol * leaves**0.5:
        return "agrees", None
    text = f"along one direction it gives {ahead:.8g}, reverse mode {back:.8g}"
    return "differs", Finding("forward_mode", "", text)


def _at_highest(
    judging: Judge,
    computed: _Computed,
    tested: Problem,
    again: Callable[[_Computed], Judge],
) -> tuple[list[LeafCheck], _Computed]:
    """The verdicts, and what is computed natively, with products in all digits."""
    natively = NativeGradient(replace(tested, gradient=at_highest(tested.gradient)))
    computed = replace(computed, native=natively())
    judge = again(computed)
    if computed.wide:  # what was measured is compared with the same numbers
        judge = replace(judge, _known=judging._known)
    numbers = range(len(tested.names))
    return [judge.leaf(number) for number in numbers], computed


def _with_place(leaves: list[LeafCheck], problem: Problem) -> list[LeafCheck]:
    """Says where an imprecise gradient loses its digits."""
    found = where_digits_go(problem)
    if found is None:
        return leaves
    operation, place = found
    return [
        replace(leaf, text=f"{leaf.text}; most are lost by {operation}, in {place}")
        if leaf.verdict == "imprecise" and not leaf.cause
        else leaf
        for leaf in leaves
    ]


def _run_on(
    judging: Judge, leaves: list[LeafCheck], options: Options, computed: _Computed
) -> list[LeafCheck]:
    """Judges the leaves in doubt once more, with loops run on to convergence.

    A loop that stops at a tolerance has another derivative than what it converges to,
    which is what an implicit rule gives. If the loss stays, it's such a loop.
    """
    doubtful = [k for k, leaf in enumerate(leaves) if leaf.verdict in BAD]
    measuring = judging.measuring
    if not doubtful or not np.isfinite(measuring.reference.here):
        return leaves
    here = measuring.reference.here
    further = Reference(measuring.problem, options.max_evaluations, run_on=_RUN_ON)
    further.pulls = computed.reference.pulls
    if not abs(further.here - here) <= 1e-2 * abs(here):
        return leaves
    measuring = replace(measuring, reference=further)
    again = replace(judging, measuring=measuring, _known={})
    after = again.leaves()
    judging.measuring.reference.evaluations += further.evaluations
    text = "judged with the loss's loops run on to convergence"
    return [
        replace(after[k], text=text)
        if k in doubtful and after[k].verdict not in BAD
        else leaf
        for k, leaf in enumerate(leaves)
    ]


def _alone(problem: Problem, options: Options) -> list[LeafCheck]:
    """A custom rule's verdict; its operands are its leaves."""
    return judge(problem, options, with_rules=False).leaves


def _claim(
    problem: Problem,
    computed: _Computed,
    given: Given | None,
    nudged: Callable[[], list[Leaf]] | None,
) -> Claim:
    native, widely = computed.native, computed.wide
    none: list[Leaf | float] = [0.0] * len(problem.names)
    if given is not None and given.problem is None:
        # Rounding takes a tree of values as far as it takes JAX's own, about.
        noise: list[Leaf | float] = [
            _noise(x, eps) for x, eps in zip(given.values, given.eps, strict=True)
        ]
        if native is not None and widely is not None:
            noise = [
                _with_gap(n, wide(a), b)
                for n, a, b in zip(noise, native.leaves, widely.leaves, strict=True)
            ]
        return Claim(given.values, noise, None, None)
    assert native is not None
    if widely is None:
        eps = [epsilon(x.dtype) for x in problem.values]
        leaves = [wide(x) for x in native.leaves]
        # Not known, since nothing wider is: a sum of a thousand roundings.
        loose: list[Leaf | float] = [
            _noise(x, 30 * e) for x, e in zip(leaves, eps, strict=True)
        ]
        return Claim(leaves, loose, None, None)
    return Claim(widely.leaves, none, native.leaves, nudged)


@made_of_leaf
def _noise(xp: Any, array: Leaf, eps: Any) -> Any:
    """What a few roundings do to each entry, and to a sum of entries of its leaf."""
    rms = xp.sqrt(xp.mean(xp.square(array))) if array.size else 0.0
    return eps * (xp.abs(array) + rms)


@made_of_leaf
def _with_gap(xp: Any, noise: Leaf, native: Leaf, widely: Leaf) -> Any:
    return noise + 10 * xp.abs(native - widely)


def _differ(computed: _Computed) -> tuple[float, float] | None:
    """The loss, and what its gradient's forward part returns, if they differ."""
    reference, native, wide = computed.reference, computed.native, computed.wide
    here = reference.here
    if wide is not None:
        other, slack = wide.value, 1e-6
    elif native is not None:
        other, slack = native.value, 1e-3
    else:
        return None
    if reference.notes:
        slack = 1e-3
    if not np.isfinite(here - other):
        return None
    # A loss that loses digits by cancellation differs from itself by that much.
    scale = abs(here) + reference.rounding / np.finfo(np.float64).eps
    return (here, other) if abs(here - other) > slack * scale else None


def _nondeterministic(problem: Problem, reference: Reference) -> bool:
    """Whether two fresh traces of the loss differ by more than rounding."""
    again = replace(problem, loss=problem.retrace())
    anew = Reference(again, None)
    anew.pulls = reference.pulls
    return not abs(anew.here - reference.here) <= 1e-9 * abs(reference.here)


def _with_rule(leaf: LeafCheck, rules: Sequence[RuleCheck]) -> LeafCheck:
    """The cause by the rule at fault, where the leaf alone shows none."""
    wrong = [rule for rule in rules if rule.verdict == "wrong"]
    if leaf.verdict != "wrong" or not wrong:
        return leaf
    rule = wrong[0]
    said = leaf.cause
    if said is None or (said.kind == "unknown" and rule.cause is not None):
        said = rule.cause or Cause("unknown", rule.text)
    text = f"{said.text} The rule of {rule.place} is at fault."
    return replace(leaf, cause=Cause(said.kind, text))


def _not_looked_for(problem: Problem, leaves: Sequence[LeafCheck]) -> list[Finding]:
    """What can't be said of wrong leaves that are spread over devices."""
    text = (
        "its gradient is spread over {} devices and stays there: whether it is "
        "transposed, permuted, wrong by rows or columns or lacks a term, which takes "
        "the whole of it, wasn't looked at. Check a smaller model on one device"
    )
    return [
        Finding("spread", leaf.path, text.format(len(value.sharding.device_set)))
        for leaf, value in zip(leaves, problem.values, strict=True)
        if stays_spread(value)
        and leaf.cause
        and leaf.cause.kind == "unknown"
        and leaf.relative_error != np.inf  # of what should be zero nothing is missing
    ]


def _counts(problem: Problem) -> dict[str, int]:
    """Sizes that a factor may come from: of the data, and of what the loss sums up."""
    counts: dict[str, int] = {}
    for x in problem.fixed:
        if jnp.ndim(x) and len(x) > 1:
            counts.setdefault("batch size", len(x))
    for eqn in equations(problem.loss):
        if eqn.primitive.name == "reduce_sum":
            before, after = eqn.invars[0].aval.size, eqn.outvars[0].aval.size
            if after and before // after > 1:
                n = before // after
                counts.setdefault("number of values that are summed", n)
    return counts
