"""The call: `check_gradient` and `assert_gradient`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checking.judging import Given, Judged, Options, judge
from jaxgrad.checking.leaves import leaf_of, operand, spread_like
from jaxgrad.checking.problem import (
    Problem,
    epsilon,
    equations_of,
    scalar_function,
)
from jaxgrad.checking.report import BAD, GradientCheck, LeafCheck
from jaxgrad.checking.sums import wide
from jaxgrad.operands import Operands, operands_of
from jaxgrad.placing import check_devices
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
      >>> params = {"x": jnp.array(3.0)}
      >>> check = jaxgrad.check_gradient(lambda p: square(p["x"]), params)
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
    if not rtol > 0:
        raise ValueError(f"rtol must be greater than 0, and is {rtol!r}.")
    seed = 0 if key is None else int(jax.random.bits(key))
    params = as_params(params)
    patterns = [leaves] if isinstance(leaves, str) else leaves
    operands, names, integers = operands_of(params, args, patterns)
    check_devices(zip(operands.names, operands.arrays, strict=True))
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

    problem = trace(function, reverse=gradient is None)
    options = Options(rtol, seed, max_evaluations)
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
    return _report(judged, rows, second, start)


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


def _integer(name: str, leaf: Any) -> LeafCheck:
    return LeafCheck(
        name,
        tuple(leaf.shape),
        str(leaf.dtype),
        "not_differentiable",
        text="an array of integers or booleans has no gradient",
    )


def _given(
    gradient: Any, operands: Operands, names: Sequence[str], params: PyTree, args: Any
) -> Given:
    """A gradient from the user, checked against the structure of `params`.

    Raises:
      ValueError: a leaf is missing, or of another shape.
    """
    known = {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

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
                    f"{', '.join(f'`{n}`' for n in list(found)[:8]) or 'none'}; it "
                    "must have the structure of params."
                )
            if jnp.shape(found[name]) != value.shape:
                raise ValueError(
                    f"gradient= has shape {jnp.shape(found[name])} in leaf `{name}`, "
                    f"where params has {value.shape}."
                )
            if jnp.issubdtype(jnp.result_type(found[name]), jnp.complexfloating):
                raise ValueError(
                    f"gradient= is complex in leaf `{name}`; a real one was expected."
                )
            out.append(found[name])
        for name in found:
            if name not in known:
                raise ValueError(
                    f"gradient= has a leaf `{name}`, which params doesn't have. It "
                    "must have the structure of params."
                )
        return out

    # A module of gradients can be called too, and is one of values all the same.
    if not callable(gradient) or type(gradient) is type(params):
        leaves = leaves_of(gradient)
        eps = [
            epsilon(jnp.result_type(x))
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
            else 0.0
            for x in leaves
        ]
        pairs = zip(leaves, operands.values, strict=True)
        return Given([wide(leaf_of(x, value)) for x, value in pairs], eps, None)

    def backward(
        values: Sequence[Any], fixed: Sequence[Any], cotangent: Any
    ) -> tuple[Any, Any]:
        tree = gradient(*operands.merge(values, fixed))
        return cotangent, [jnp.asarray(x) for x in leaves_of(tree)]

    def problem(problem: Problem) -> Problem:
        one = np.ones((), problem.loss.out_avals[0].dtype)
        closed = jax.make_jaxpr(backward)(operands.values, operands.fixed, one)
        return replace(problem, gradient=closed, forward=None)

    return Given([], [], problem)


def _second(function: Any, problem: Problem, options: Options) -> GradientCheck:
    """Checks the gradient of the gradient times a fixed vector."""
    start = time.perf_counter()
    rng = np.random.default_rng(options.seed + 1)
    with jax.enable_x64(True):
        vector = [
            jnp.asarray(operand(spread_like(rng, x), x), x.dtype)  # the leaf's own
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
    return _report(judged, judged.leaves, None, start)


def _report(
    judged: Judged,
    rows: Sequence[LeafCheck],
    second: GradientCheck | None,
    start: float,
) -> GradientCheck:
    return GradientCheck(
        ok=not any(row.verdict in BAD for row in rows)
        and not any(rule.verdict == "wrong" for rule in judged.rules)
        and not any(finding.kind == "value" for finding in judged.findings)
        and (second is None or second.ok),
        leaves=tuple(rows),
        rules=tuple(judged.rules),
        findings=tuple(judged.findings),
        second_order=second,
        forward_mode=judged.forward_mode,
        evaluations=judged.evaluations,
        seconds=time.perf_counter() - start,
    )
