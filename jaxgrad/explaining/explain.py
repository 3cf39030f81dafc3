"""Explains a step: evaluates the loss and its derivatives, and says what they mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float

from jaxgrad.explaining.line import Line, along
from jaxgrad.explaining.programs import Form, coarsest, lanczos, moved, programs_of
from jaxgrad.explaining.report import EntryStep, LeafStep, StepExplanation
from jaxgrad.gradients import once_per_loss
from jaxgrad.model import LinearParams
from jaxgrad.operands import operands_of
from jaxgrad.placing import check_devices, layouts_of, numbers_of
from jaxgrad.precision import findings_of, lowered
from jaxgrad.pytrees import Loss, PyTree, as_params, kind_of
from jaxgrad.tables import Finding, number

# Entries are listed for leaves of at most so many.
_SMALL = 8
# A step longer than the parameters themselves replaces what they hold.
_EXPLODING = 1.0
# At the largest step at which no leaf explodes, a leaf whose relative step is 1e-4 of
# the longest needs 10,000 steps to move by its own size: as long as a whole training.
_VANISHING = 1e-4
# A product in bfloat16 is good to 8 bits; whole gradients don't agree so by chance.
_AGREES = 2.0**-8
_REAL = "differentiable", "integer"


def explain_step(
    loss: Loss,
    params: PyTree,
    *args: Any,
    learning_rate: float | Float[ArrayLike, ""],
    sharpness: bool = False,
    has_aux: bool = False,
) -> StepExplanation:
    r"""Says what one step of gradient descent will do, and what limits its length.

    The step is $p \leftarrow p - \eta g$ with the gradient $g$, as `sgd_update` makes
    it. The gradient alone predicts a decrease of $\eta \|g\|^2$; with the curvature
    $k = g^\top H g / g^\top g$ (one Hessian-vector product) it is
    $\eta \|g\|^2 (1 - \eta k / 2)$, largest at $1/k$ and negative from $2/k$ on, if
    $k > 0$. The loss itself may do otherwise, and is evaluated along the line
    $L(p - \eta g)$, at learning rates each 1.19 times the one before, until it rises,
    and between the last two. A rise must be larger than the loss's rounding, which is
    measured there. All is computed in the parameters' own dtypes, as in training.

    Arrays may be spread over a mesh, and stay as they are. Where other processes have
    parts of them, every process must call this, and gets the same explanation.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree; static leaves, keys and integers are held.
      *args: the rest of the loss's arguments.
      learning_rate: $\eta$, a finite number above 0.
      sharpness: also compute the largest eigenvalue of the Hessian, by Lanczos, to the
        square root of the dtype's rounding error, relative to its largest absolute one.
      has_aux: the loss returns `(loss, aux)`; the aux is dropped.

    Returns:
      A `StepExplanation`. It is true if the step lowers the loss and all is finite.

    Raises:
      ValueError: the learning rate isn't a finite number above 0; arrays are on
        different devices.
      TypeError: as `value_and_grad`, but for leaves of integers.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> loss = lambda w: jnp.sum(w**2)
      >>> step = jaxgrad.explain_step(loss, jnp.array([3.0]), learning_rate=0.1)
      >>> print(f"{step.predicted_decrease:.2f} {step.decrease:.2f}")
      3.60 3.24
      >>> print(f"{step.curvature:.2f} {step.best_rate:.2f} {step.first_rise:.2f}")
      2.00 0.50 1.00

    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, chapter 3. The
    rounding: More and Wild, Estimating computational noise, SIAM J. Sci. Comput. 33
    (2011). The sharpness: Cohen et al. 2021, https://arxiv.org/abs/2103.00065.
    """
    rate = float(np.asarray(learning_rate))
    if not 0 < rate < 1e38:  # in float32 too
        raise ValueError(
            "learning_rate must be one finite number above 0 (and below 1e38), and is "
            f"{learning_rate}. The step is p - learning_rate * gradient."
        )
    params = as_params(params)
    operands, names, integers = operands_of(params, args, None)
    check_devices(zip(operands.names, operands.arrays, strict=True))
    layouts = layouts_of(operands.values)
    programs = once_per_loss(
        loss, ("explain", has_aux), lambda get_loss: programs_of(get_loss, has_aux)
    )
    for forward in (True, False):  # whether there is a forward mode shows in tracing
        form = Form(operands.static, operands.chosen, forward, layouts)
        given = form, operands.values, operands.fixed
        try:
            here, gradient, stats, curvature = programs.look(*given, rate)
            break
        except Exception:
            if not forward:
                raise
    precision = coarsest([here]), coarsest(operands.values)
    here, curvature = float(here), float(curvature)
    leaves, norm, size = _leaves(operands.values, names, gradient, stats, rate)
    finite = math.isfinite(here) and math.isfinite(norm)
    facts: dict[str, Any] = {}
    # (Traced by the call above: this finds it.)
    closed = programs.look.trace(*given, rate).jaxpr
    findings = findings_of(lowered(closed, operands.arrays))
    if finite:
        facts.update(loss_after=here, decrease=0.0, predicted_decrease=rate * norm**2)
    if finite and norm > 0:

        def phi(rate: float) -> float:
            return float(programs.value(*given, gradient, rate))

        after = phi(rate)
        real = here - after if math.isfinite(after) else None
        facts.update(loss_after=after, decrease=real)
        if math.isfinite(curvature):
            limit = 2 / curvature if curvature > 0 else None
            facts.update(curvature=curvature, quadratic_limit=limit)
        # Where the tangent reaches 0, where the step is as long as the parameters,
        # where the quadratic model is lowest.
        lengths = [abs(here) / norm / norm, size / norm, 1 / abs(curvature or math.inf)]
        lengths = [t for t in lengths if 0 < t < 1e35] or [1.0]
        line = along(phi, here, rate, lengths, *precision)
        facts.update(list(line._asdict().items())[:4])
        findings += _findings(line, here, norm, curvature, forward)
        if line.first_rise is not None and not math.isfinite(phi(line.first_rise)):
            text = f"the loss isn't finite at learning rate {number(line.first_rise)}."
            findings.append(Finding("nonfinite_ahead", "", text))
    if sharpness and finite:
        facts["sharpness"], sure = lanczos(programs, *given)
        if not sure:
            text = "not converged: the largest eigenvalue is at least the one given."
            text = "the Hessian isn't finite." if facts["sharpness"] is None else text
            findings.append(Finding("sharpness", "", text))
    linear = isinstance(params, LinearParams) and args and kind_of(args[0]) in _REAL
    if linear and np.size(args[0]) <= _SMALL:
        leaves, facts["predictions"] = _linear(leaves, np.ravel(numbers_of(args[0])))
    leaves += [
        LeafStep(n, x.shape, str(x.dtype), warning="not_differentiable")
        for n, x in integers
    ]
    return StepExplanation(
        ok=(facts.get("decrease") or 0.0) > 0,
        learning_rate=rate,
        loss=here,
        gradient_norm=norm,
        leaves=tuple(leaves),
        findings=tuple(findings),
        **facts,
    )


def _leaves(
    values: list[Any],
    names: tuple[str, ...],
    gradient: list[Any],
    stats: Any,
    rate: float,
) -> tuple[list[LeafStep], float, float]:
    """What the step does to each leaf; the norms of gradient and parameters."""
    norms, sizes, moves = numbers_of(stats).astype(np.float64).T
    whole, size = math.hypot(*norms), math.hypot(*sizes)
    finite = math.isfinite(whole)
    roots = np.sqrt([max(x.size, 1) for x in values])
    scales = np.maximum(sizes / roots, size / np.linalg.norm(roots))
    steps = rate * norms / roots / np.where(scales > 0, scales, math.inf)
    small = [i for i, x in enumerate(values) if finite and x.size <= _SMALL]
    entries = {i: _entries(values[i], gradient[i], rate) for i in small}
    heights = [abs(e.gradient) for leaf in entries.values() for e in leaf]
    leaves = []
    for i, x in enumerate(values):
        warnings = {
            "nonfinite": not math.isfinite(norms[i]),
            "zero": norms[i] == 0 and x.size > 0,
            "lost": moves[i] == 0 and norms[i] > 0,
            "exploding": steps[i] > _EXPLODING,
            "vanishing": x.size > 0 and steps[i] < _VANISHING * np.max(steps),
        }
        leaves.append(
            LeafStep(
                path=names[i],
                shape=x.shape,
                dtype=str(x.dtype),
                gradient_norm=float(norms[i]),
                rank=1 + int(np.sum(norms > norms[i])) if finite else None,
                relative_step=float(steps[i]) if finite and scales[i] > 0 else None,
                warning=next((word for word, so in warnings.items() if so), ""),
                entries=tuple(
                    replace(e, rank=1 + sum(h > abs(e.gradient) for h in heights))
                    for e in entries.get(i, [])
                ),
            )
        )
    return leaves, whole, size


def _entries(value: Any, gradient: Any, rate: float) -> list[EntryStep]:
    value, gradient = numbers_of(value), numbers_of(gradient)
    with np.errstate(all="ignore"):
        (after,) = moved([value], [gradient], np.asarray(rate))
    entries = []
    for index in np.ndindex(np.shape(value)):
        g, does = float(gradient[index]), "nothing: its slope is 0"
        if g:
            does = f"{'increase' if g < 0 else 'decrease'}: the loss falls"
        numbers = float(value[index]), g, does, float(after[index])
        entries.append(EntryStep(index, *numbers, rank=0))
    return entries


def _findings(
    line: Line, here: float, norm: float, curvature: float, forward: bool
) -> list[Finding]:
    said = {}
    if not math.isfinite(curvature):
        said["curvature"] = "not finite along the gradient, though the gradient is."
    elif not forward:
        said["curvature"] = "by differences: the gradient has no forward mode."
    if not here - line.lowest > line.rounding:
        text = "no learning rate lowers the loss by more than its rounding, "
        text += number(line.rounding, 2)
        if curvature > 0 and norm * norm / curvature / 2 <= 4 * line.rounding:
            text += ", nor would the quadratic model: as far as the dtype can tell, "
            said["minimum"] = text + "this is a minimum."
        else:
            text += ", though the gradient says so: the point may be on a kink, or "
            text += "the gradient wrong: see `jaxgrad.check_gradient`."
            said["no_descent"] = text
    return [Finding(kind, "", text) for kind, text in said.items()]


def _linear(
    leaves: list[LeafStep], inputs: Any
) -> tuple[list[LeafStep], tuple[float, float] | None]:
    """Of a linear model and one row, the gradient as error signal times input.

    Only if it is that: the bias's gradient is taken for the signal, and the weight's
    must then be the product. The predictions before and after, if there's one output.
    """
    shapes = [leaf.shape for leaf in leaves if leaf.entries]
    out = shapes[0][:1] if shapes else ()
    if shapes != [(*out, *inputs.shape), out]:
        return leaves, None
    signals = [e.gradient for e in leaves[1].entries]
    factors = [*inputs.astype(float).tolist(), 1.0]
    told, before, after = [], 0.0, 0.0
    for leaf in leaves:
        entries = []
        for e in leaf.entries:
            signal, factor = signals[e.index[0]], factors[(*e.index, -1)[1]]
            if abs(signal * factor - e.gradient) > _AGREES * abs(e.gradient):
                return leaves, None
            entries.append(replace(e, signal=signal, input=factor))
            before, after = before + e.value * factor, after + e.after * factor
        told.append(replace(leaf, entries=tuple(entries)))
    return told, (before, after) if len(signals) == 1 else None
