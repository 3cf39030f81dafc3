"""The call: `trace_gradient`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad.equations import call, graph_of, in_library
from jaxgrad.flow import frame_of
from jaxgrad.operands import operands_of
from jaxgrad.placing import check_devices
from jaxgrad.precision import findings_of, lowered, with_backward
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    as_params,
    function_name,
    kind_of,
    loss_and_aux,
)
from jaxgrad.tables import Finding
from jaxgrad.tracing.report import GradientTrace


def trace_gradient(
    loss: Loss, params: PyTree, *args: Any, has_aux: bool = False
) -> GradientTrace:
    r"""Shows every operation of a loss, and the gradient that flows back through it.

    Each step of the loss has its value $v$ and its cotangent $\partial L / \partial v$,
    from JAX's own backward pass, in one compiled program; and the line of your source
    that it came from. Where the loss or a gradient is NaN or infinite, the trace says
    where the first such number was made, why, and what to write instead; where a
    parameter's gradient is zero, which steps stop it.

    Arrays may be spread over a mesh, and stay as they are. Where other processes have
    parts of them, every process must call this, and gets the same trace.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      params: any pytree. Arrays of floats are differentiated, of any shape and dtype;
        integers and booleans are passed over.
      *args: the rest of the loss's arguments.
      has_aux: the loss returns `(loss, aux)`.

    Returns:
      A `GradientTrace`. It is true if the loss and its gradient are finite, and no
      leaf's gradient is all zero, unless the loss is at a minimum.

    Raises:
      TypeError: there is nothing to differentiate, or a leaf is complex; the loss isn't
        a real scalar; it needs the value of an array on the host (`float(x)`,
        `x.item()`, `np.asarray(x)`, `if x > 0`).
      ValueError: the loss is an array, not a scalar; arrays are on different devices.

    Example:
      >>> import jax.numpy as jnp, jaxgrad
      >>> loss = lambda w: jnp.where(w > 0, jnp.sqrt(w), 0.0)
      >>> trace = jaxgrad.trace_gradient(loss, 0.0)
      >>> bool(trace), trace.loss, float(trace.gradient)
      (False, 0.0, nan)
      >>> trace.first_nonfinite.operation, trace.first_nonfinite.kind
      ('sqrt', 'infinite slope')

    Source: Griewank and Walther, Evaluating Derivatives, 2nd edition, section 3.2; JAX,
    "How JAX primitives work", https://docs.jax.dev/en/latest/jax-primitives.html.
    """
    params = as_params(params)
    operands, leaves, integers = operands_of(params, args, None)
    check_devices(zip(operands.names, operands.arrays, strict=True))
    chosen = set(operands.chosen)
    fixed = [n for i, n in enumerate(operands.names) if i not in chosen]

    def scalar(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        output = loss(*operands.merge(values, fixed))
        return jnp.asarray(loss_and_aux(loss, output, has_aux)[0])

    def traced(values: Sequence[Any], fixed: Sequence[Any]) -> Any:
        return call(scalar, values, fixed)

    try:
        with jax.disable_jit(False):
            closed = jax.make_jaxpr(traced)(operands.values, operands.fixed)
        graph = graph_of(closed)
        aval = graph.avals[graph.results[0]]
        frame = frame_of(
            graph,
            [*operands.values, *operands.fixed],
            [*leaves, *fixed],
            range(len(leaves)),
            {0: jnp.ones(aval.shape, aval.dtype)},
        )
        every = with_backward(closed, len(leaves))
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise TypeError(_needs_the_host(loss, error)) from error
    except Exception as error:
        error.add_note(
            f"while tracing the loss {function_name(loss)}{_place_of(error)}"
        )
        raise
    gradient = [frame.cotangents[place] for place in range(len(leaves))]
    stock = iter(gradient)
    tree = jax.tree.map(
        lambda leaf: next(stock) if kind_of(leaf) == "differentiable" else None, params
    )
    findings = findings_of(lowered(every, operands.arrays))
    trace = GradientTrace(
        loss=float(frame.values[graph.results[0]]),
        gradient=tree,
        name=function_name(loss),
        not_differentiable=tuple(name for name, _ in integers),
        findings=(*findings, *([_ELSEWHERE] if frame.spans_processes else [])),
        _frame=frame,
    )
    if frame.spans_processes:
        trace.settle()
    return trace


_ELSEWHERE = Finding(
    "other_processes",
    "",
    "have parts of the arrays, so that `step.inside()`, which would compute something "
    "later, can't be shown. All else has been computed in the call.",
)


def _needs_the_host(loss: Loss, error: Exception) -> str:
    """Says which line of the loss asks for a number while it is being traced."""
    return (
        f"The loss {function_name(loss)} needs the value of an array on the host"
        f"{_place_of(error)}. While a gradient is traced there are no values yet: keep "
        "to jnp (`jnp.where` or `jax.lax.cond` for `if`, arrays for `float(x)`, "
        "`x.item()` and NumPy), or pass what doesn't depend on params as a plain "
        "Python number in *args."
    )


def _place_of(error: Exception) -> str:
    """The innermost line outside of libraries that an error went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not in_library(frame.filename):
            return f" at {frame.filename}, line {frame.lineno}: `{frame.line}`"
    return ""
