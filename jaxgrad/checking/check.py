"""The call: `check_gradient` and `assert_gradient`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.causes import Cause
from jaxgrad.checking.candidates import parts_of, without_rules
from jaxgrad.checking.digits import where_digits_go
from jaxgrad.checking.problem import (
    Gradients,
    NativeGradient,
    Operands,
    Problem,
    WideGradient,
    as_numpy,
    compile_all,
    equations_of,
    on_host,
    operands_of,
    scalar_function,
    spread,
)
from jaxgrad.checking.reference import OutOfBudget, Reference
from jaxgrad.checking.report import (
    BAD,
    Finding,
    GradientCheck,
    LeafCheck,
    RuleCheck,
)
from jaxgrad.checking.rules import check_rules
from jaxgrad.checking.verdict import Claim, Judge
from jaxgrad.equations import Opaque, equations
from jaxgrad.pytrees import Loss, PyTree, as_params, function_name, leaf_name


def check_gradient(
    loss: Loss,
    params: PyTree,
    *args: Any,
    gradient: Callable[..., PyTree] | PyTree = None,
    reference: Loss | None = None,
    order: Literal[1, 2] = 1,
    rtol: float = 1e-4,
    leaves: Sequence[str] | str | None = None,
    trust: Sequence[Callable[..., Any]] = (),
    has_aux: bool = False,
    key: jax.Array | None = None,
    max_evaluations: int | None = None,
) -> GradientCheck:
    r"""Says whether the gradient of a loss is right, where it is wrong, and how.

    The gradient's equations are evaluated in float64, and so is the loss, beside the
    point: the slopes that its values alone show along random directions $v$ in each
    leaf, $(L(p + h v) - L(p - h v)) / 2h$, extrapolated to $h = 0$, are what
    $\langle \nabla L, v \rangle$ must be. A `stop_gradient` returns the value at the
    point, as it does for `jax.grad`.

    Args:
      loss: a pure function `loss(params, *args)`. It returns a real scalar, or arrays,
        which are projected on fixed random ones.
      params: any pytree. Arrays of floats are checked, of any shape and dtype.
      *args: the rest of the loss's arguments.
      gradient: what to check instead of `jax.grad(loss)`: a function of
        `(params, *args)`, or its values, with the structure of `params`.
      reference: a plain function of `(params, *args)` that says what the loss should
        compute. It is what gets evaluated; the loss's value is compared with it.
      order: 2 checks the Hessian times a fixed vector too, as the gradient of
        $\langle \nabla L, u \rangle$.
      rtol: how far off a leaf's gradient may be, relative to its 2-norm.
      leaves: paths of the leaves to check, `*` standing for any text; all if `None`.
      trust: functions whose custom rule is meant to differ from their derivative, such
        as a straight-through estimator or a gradient reversal.
      has_aux: the loss returns `(loss, aux)`.
      key: chooses the random directions; `None` for fixed ones.
      max_evaluations: how often the loss may be evaluated, at most.

    Returns:
      A `GradientCheck`. It is true if no leaf is wrong, non-finite or undecided.

    Raises:
      TypeError: there is no leaf to check, or one is complex; the loss returns no
        real numbers.
      ValueError: `gradient` has another structure or shape than `params`; `leaves` or
        `trust` fit nothing; the loss goes through a callback or kernel, which can't be
        evaluated in float64, and there is no `reference`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxgrad
      >>> @jax.custom_vjp
      ... def square(x):
      ...     return x**2
      >>> square.defvjp(lambda x: (x**2, x), lambda x, ct: (ct * x,))  # not 2 x
      >>> check = jaxgrad.check_gradient(lambda p: square(p["x"]), {"x": jnp.array(3.0)})
      >>> check.ok, check.leaves[0].verdict, check.leaves[0].cause.kind
      (False, 'wrong', 'factor')
      >>> check.rules[0].function, check.rules[0].verdict
      ('square', 'wrong')

    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, section 8.1;
    https://docs.pytorch.org/docs/stable/notes/gradcheck.html.
    """
    start = time.perf_counter()
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, and is {order!r}.")
    seed = 0 if key is None else int(jax.random.bits(key))
    params = as_params(params)
    patterns = [leaves] if isinstance(leaves, str) else leaves
    operands, names, integers = operands_of(params, args, patterns)
    scalar = scalar_function(loss, has_aux, seed)

    def function(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        return scalar(*operands.merge(values, fixed))

    def trace(function: Any, reverse: bool) -> Problem:
        try:
            return equations_of(
                names,
                operands.values,
                operands.fixed,
                function,
                trust=trust,
                reverse=reverse,
            )
        except Exception as error:
            error.add_note(f"while tracing the loss {function_name(loss)} for a check")
            raise

    problem = trace(
        function, reverse=not (gradient is not None and reference is not None)
    )
    options = _Options(rtol, seed, max_evaluations)
    plain = problem
    if reference is not None:
        wanted = scalar_function(reference, has_aux, seed)
        plain = equations_of(
            names,
            operands.values,
            operands.fixed,
            lambda values, fixed: wanted(*operands.merge(values, fixed)),
        )
    given = None
    if gradient is not None:
        given = _given(gradient, operands, names, params, args)
    judged = judge(problem, options, plain=plain, given=given)
    rows = [*judged.leaves, *(_integer(name, leaf) for name, leaf in integers)]
    second = None
    if order == 2 and problem.gradient is not None:
        second = _second(function, problem, options)
    return GradientCheck(
        ok=not any(row.verdict in BAD for row in rows)
        and not any(rule.verdict == "wrong" for rule in judged.rules)
        and (second is None or second.ok)
        and not any(finding.kind in _FATAL for finding in judged.findings),
        leaves=tuple(rows),
        rules=tuple(judged.rules),
        findings=tuple(judged.findings),
        second_order=second,
        forward_mode=judged.forward_mode,
        evaluations=judged.evaluations,
        seconds=time.perf_counter() - start,
    )


def assert_gradient(
    loss: Loss,
    params: PyTree,
    *args: Any,
    undecided: Literal["fail", "pass"] = "fail",
    **options: Any,
) -> None:
    """Raises if the gradient of a loss isn't right; for tests.

    Args:
      loss: as `check_gradient`.
      params: as `check_gradient`.
      *args: as `check_gradient`.
      undecided: whether a leaf on which no verdict could be reached fails.
      **options: as `check_gradient`.

    Returns:
      Nothing.

    Raises:
      AssertionError: a leaf is wrong or non-finite, or undecided unless that passes.
        The message is the printed report.

    Example:
      >>> import jaxgrad
      >>> jaxgrad.assert_gradient(lambda w: w**2, 3.0)
    """
    if undecided not in ("fail", "pass"):
        raise ValueError(f'undecided must be "fail" or "pass", and is {undecided!r}.')
    report = check_gradient(loss, params, *args, **options)
    if report.ok:
        return
    bad = {leaf.verdict for leaf in report.leaves if leaf.verdict in BAD}
    if undecided == "pass" and bad == {"undecided"}:
        return
    raise AssertionError(f"\n{report}")


@dataclass(frozen=True)
class _Options:
    rtol: float
    seed: int
    max_evaluations: int | None


@dataclass(frozen=True)
class _Given:
    """A gradient from the user: its values, and its equations if it's a function."""

    values: list[np.ndarray]
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
    values: tuple[float, float] | None
    """The value of the function, and what its gradient's forward part returns."""


# By this share of themselves parameters are moved, to see what rounding does: some 50
# roundings, so that those in the middle of a computation are seen too.
_NUDGE = 1e-14
# Loops are run on for twice as many steps again: what was left at the tolerance t is
# then t**3, as far as each step takes the same share of it.
_RUN_ON = 2
# A loss that isn't what the reference or its own second trace gives can't be right.
_FATAL = ("value",)


def judge(
    problem: Problem,
    options: _Options,
    *,
    plain: Problem | None = None,
    given: _Given | None = None,
    with_rules: bool = True,
) -> Judged:
    """Judges a problem's gradient by the values of `plain`, by default its own loss."""
    plain = plain or problem
    tested = problem
    if given is not None and given.problem is not None:
        tested = given.problem(problem)
    notes: list[str] = []
    findings: list[Finding] = []
    reference = Reference(plain, options.max_evaluations)
    programs = [reference.program]
    native = wide = widely = None
    if tested.gradient is not None:
        natively = NativeGradient(tested)
        programs.append(natively.program)
        try:
            widely = WideGradient(tested, _tangents(tested, options.seed), notes)
            programs.append(widely.program)
        except Opaque as error:
            if plain is problem:
                raise
            text = f"{error}".partition(". Pass")[0]
            findings.append(Finding("native", "", f"{text}: judged as it is computed"))
        compile_all(programs)
        native = natively()
        wide = widely() if widely else None
    pulls = wide.pulls if wide else {}
    with jax.enable_x64(True):
        reference.pulls = on_host(pulls)
    notes += reference.notes
    nudged = functools.cache(lambda: widely(_NUDGE).leaves) if widely else None
    claim = _claim(tested, native, wide, given, nudged)

    def candidates() -> list[list[np.ndarray]]:
        if not found:
            if wide is not None and (given is not None or plain is not problem):
                found.append(wide.leaves)
            for hold in (1, 2) if reference.inner_stops else (1,):
                array = without_rules(plain, pulls, hold)
                if array is not None:
                    found.append(array)
        return found

    found: list[list[np.ndarray]] = []
    parts: list[Any] = []

    def parts_for(number: int) -> list[tuple[str, np.ndarray]]:
        if not parts:
            parts.append(parts_of(plain, pulls))
        return [(label, leaf[number]) for label, leaf in parts[0]]

    judging = Judge(
        plain,
        reference,
        claim,
        options.rtol,
        candidates,
        _counts(plain),
        parts_for,
        options.seed,
    )
    leaves = judging.leaves()
    if any(eqn.primitive.name == "while" for eqn in equations(plain.loss)):
        leaves = _run_on(judging, leaves, options, pulls)
    if any(leaf.verdict == "imprecise" for leaf in leaves):
        leaves = _with_place(leaves, tested)
    values = _values(reference, wide, native, leaves) if given is None else None
    rules: list[RuleCheck] = []
    bad = [leaf.verdict in BAD for leaf in leaves]
    if with_rules and given is None and (any(bad) or values):
        rules = check_rules(problem, lambda p: _alone(p, options), options.seed)
        leaves = [_with_rule(leaf, rules) for leaf in leaves]
    if values and not any(r.verdict == "wrong" for r in rules) and with_rules:
        leaves, finding = _unlike(leaves, values, plain is not problem)
        findings.append(finding)
    findings += [
        Finding(
            "native",
            "",
            f"{note} can't be computed in float64: it keeps its own dtype, and the "
            "reference is coarser for it",
        )
        for note in dict.fromkeys(notes)
    ]
    if any(eqn.primitive.name == "random_gamma" for eqn in equations(plain.loss)):
        findings.append(
            Finding(
                "implicit",
                "",
                "a gamma sample is differentiated implicitly, as JAX does: its "
                "derivative is taken from JAX and isn't checked",
            )
        )
    forward = "none"
    if wide is not None and wide.slopes is not None:
        ahead, back = wide.slopes
        # The gradient's parts are scaled to a sum of order 1 per leaf.
        close = abs(ahead - back) <= options.rtol * len(leaves) ** 0.5
        forward = "agrees" if close or not np.isfinite(back) else "differs"
        if forward == "differs":
            text = (
                f"along one direction forward mode gives {ahead:.8g}, reverse mode "
                f"{back:.8g}"
            )
            findings.append(Finding("forward_mode", "", text))
    return Judged(leaves, rules, findings, forward, reference.evaluations, values)


def _with_place(leaves: list[LeafCheck], problem: Problem) -> list[LeafCheck]:
    """Says where an imprecise gradient loses its digits."""
    found = where_digits_go(problem)
    if found is None:
        return leaves
    operation, place = found
    return [
        replace(leaf, text=f"{leaf.text}; most are lost by {operation}, in {place}")
        if leaf.verdict == "imprecise"
        else leaf
        for leaf in leaves
    ]


def _run_on(
    judging: Judge, leaves: list[LeafCheck], options: _Options, pulls: Any
) -> list[LeafCheck]:
    """Judges the leaves in doubt once more, with loops run on to convergence.

    A loop that stops at a tolerance has another derivative than what it converges to,
    which is what an implicit rule gives. If the loss stays, it's such a loop.
    """
    doubtful = [k for k, leaf in enumerate(leaves) if leaf.verdict in BAD]
    here = judging.reference.here
    if not doubtful or not np.isfinite(here):
        return leaves
    further = Reference(judging.problem, options.max_evaluations, run_on=_RUN_ON)
    with jax.enable_x64(True):
        further.pulls = on_host(pulls)
    try:
        if not abs(further.here - here) <= 1e-2 * abs(here):
            return leaves
    except OutOfBudget:
        return leaves
    again = replace(judging, reference=further, _known={})
    after = again.leaves()
    judging.reference.evaluations += further.evaluations
    text = "judged with the loss's loops run on to convergence"
    return [
        replace(after[k], text=text)
        if k in doubtful and after[k].verdict not in BAD
        else leaf
        for k, leaf in enumerate(leaves)
    ]


def _alone(problem: Problem, options: _Options) -> Any:
    """A custom rule's verdict; its operands are its leaves."""
    judged = judge(problem, options, with_rules=False)
    return judged.leaves, judged.values


def _tangents(problem: Problem, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    values = [as_numpy(x) for x in problem.values]
    return [spread(rng, x.shape) * np.where(x == 0, 1.0, np.abs(x)) for x in values]


def _claim(
    problem: Problem,
    native: Gradients | None,
    wide: Gradients | None,
    given: Any,
    nudged: Callable[[], list[np.ndarray]] | None,
) -> Claim:
    none: list[np.ndarray | float] = [0.0] * len(problem.names)
    if given is not None and given.problem is None:
        noise = [_noise(x, eps) for x, eps in zip(given.values, given.eps, strict=True)]
        if native is not None and wide is not None:
            noise = [
                n + 10 * np.abs(a - b)
                for n, a, b in zip(noise, native.leaves, wide.leaves, strict=True)
            ]
        return Claim(given.values, noise, None, None)
    assert native is not None
    if wide is None:
        eps = [float(jnp.finfo(x.dtype).eps) for x in problem.values]
        # Not known, since nothing wider is: a sum of a thousand roundings.
        noise = [30 * _noise(x, e) for x, e in zip(native.leaves, eps, strict=True)]
        return Claim(native.leaves, noise, None, None)
    return Claim(wide.leaves, none, native.leaves, nudged)


def _noise(array: np.ndarray, eps: float) -> np.ndarray:
    """What a few roundings do to each entry, and to a sum of entries of its leaf."""
    rms = np.sqrt(np.mean(np.square(array))) if array.size else 0.0
    return 4 * eps * (np.abs(array) + rms)


def _values(
    reference: Reference,
    wide: Gradients | None,
    native: Gradients | None,
    leaves: Sequence[LeafCheck],
) -> tuple[float, float] | None:
    """The loss, and what its gradient's forward part returns, if they differ."""
    here = reference.here
    if wide is not None:
        other, slack = wide.value, 1e-6
    elif native is not None:
        other, slack = native.value, 1e-3
    else:
        return None
    if reference.notes:
        slack = 1e-3
    if not (np.isfinite(here) and np.isfinite(other)):
        return None
    # A loss that loses digits by cancellation differs from itself by that much.
    scale = abs(here) + reference.rounding / np.finfo(np.float64).eps
    return (here, other) if abs(here - other) > slack * scale else None


def _unlike(
    leaves: list[LeafCheck], values: tuple[float, float], with_reference: bool
) -> tuple[list[LeafCheck], Finding]:
    here, other = values
    if with_reference:
        text = f"the loss is {other:.8g}, the reference computes {here:.8g}"
        return leaves, Finding("value", "", text)
    text = (
        f"the loss isn't deterministic: traced twice, it gave {here:.8g} and "
        f"{other:.8g}. Draw its randomness from a key in params or args"
    )
    undecided = [replace(leaf, verdict="undecided", text=text) for leaf in leaves]
    return undecided, Finding("nondeterministic", "", text)


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


def _integer(name: str, leaf: Any) -> LeafCheck:
    return LeafCheck(
        name,
        tuple(leaf.shape),
        str(leaf.dtype),
        "not_differentiable",
        text="an array of integers or booleans has no gradient",
    )


def _counts(problem: Problem) -> dict[str, int]:
    """Sizes that a factor may come from: of the data, and of what the loss sums up."""
    counts: dict[str, int] = {}
    for x in problem.fixed:
        if jnp.ndim(x) and len(x) > 1:
            counts.setdefault("the batch size", len(x))
    for eqn in equations(problem.loss):
        if eqn.primitive.name == "reduce_sum":
            before, after = eqn.invars[0].aval.size, eqn.outvars[0].aval.size
            if after and before // after > 1:
                n = before // after
                counts[f"the number of values that are summed ({n})"] = n
    return counts


def _given(
    gradient: Any, operands: Operands, names: Sequence[str], params: PyTree, args: Any
) -> _Given:
    """A gradient from the user, checked against the structure of `params`.

    Raises:
      ValueError: a leaf is missing, or of another shape.
    """

    def leaves_of(tree: PyTree) -> list[Any]:
        found = {
            leaf_name(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        out = []
        for name, value in zip(names, operands.values, strict=True):
            if name not in found:
                raise ValueError(
                    f"gradient= has no leaf `{name}`, which params has. Its leaves are "
                    f"{', '.join(f'`{n}`' for n in list(found)[:8]) or 'none'}; it must "
                    "have the structure of params."
                )
            if jnp.shape(found[name]) != value.shape:
                raise ValueError(
                    f"gradient= has shape {jnp.shape(found[name])} in leaf `{name}`, "
                    f"where params has {value.shape}."
                )
            out.append(found[name])
        return out

    if not callable(gradient):
        leaves = leaves_of(gradient)
        eps = [
            float(jnp.finfo(jnp.result_type(x)).eps)
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
            else 0.0
            for x in leaves
        ]
        return _Given([as_numpy(x) for x in leaves], eps, None)

    def backward(
        values: Sequence[Any], fixed: Sequence[Any], cotangent: Any
    ) -> tuple[Any, Any]:
        tree = gradient(*operands.merge(values, fixed))
        return cotangent, [jnp.asarray(x) for x in leaves_of(tree)]

    def problem(problem: Problem) -> Problem:
        one = jax.ShapeDtypeStruct((), problem.loss.out_avals[0].dtype)
        closed = jax.make_jaxpr(backward)(operands.values, operands.fixed, one)
        return replace(problem, gradient=closed, forward=None, taps={})

    return _Given([], [], problem)


def _second(function: Any, problem: Problem, options: _Options) -> GradientCheck:
    """Checks the gradient of the gradient times a fixed vector."""
    start = time.perf_counter()
    rng = np.random.default_rng(options.seed + 1)
    vector = [
        jnp.asarray(spread(rng, x.shape), x.dtype)  # in the leaf's own dtype
        for x in problem.values
    ]

    def along(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        gradient = jax.grad(lambda v: function(v, fixed))(list(values))
        return sum(
            jnp.sum((g * u).astype(jnp.promote_types(g.dtype, jnp.float32)))
            for g, u in zip(gradient, vector, strict=True)
        )

    second = equations_of(problem.names, problem.values, problem.fixed, along)
    judged = judge(second, options)
    return GradientCheck(
        ok=not any(row.verdict in BAD for row in judged.leaves),
        leaves=tuple(judged.leaves),
        rules=tuple(judged.rules),
        findings=tuple(judged.findings),
        second_order=None,
        forward_mode=judged.forward_mode,
        evaluations=judged.evaluations,
        seconds=time.perf_counter() - start,
    )
