"""Binds a `custom_vjp` so that what its `bwd` does keeps its own source lines."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.extend.linear_util as lu
import jax.numpy as jnp

from jaxgrad.compiling import shaped
from jaxgrad.equations.sites import call
from jaxgrad.equations.values import bind


def bind_with_lines(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """As `bind`.

    JAX runs a `bwd` in the backward pass with the line of the forward equation in
    force, for that thread. So `bwd` is traced in another one, and its equations are
    evaluated here, each with its own line.
    """
    params = eqn.primitive.get_bind_params(eqn.params)
    if not eqn.primitive.name.startswith("custom_vjp_call"):
        return bind(eqn, operands)
    if isinstance(params, tuple):  # before jax 0.10
        functions, params = params
        functions = [*functions[:-1], _traced_apart(functions[-1])]
        return list(eqn.primitive.bind(*functions, *operands, **params))
    functions = params["subfuns"]
    functions = (*functions[:-1], _traced_apart(functions[-1]))
    return list(eqn.primitive.bind(*operands, **{**params, "subfuns": functions}))


def _traced_apart(bwd: Any) -> Any:
    x64 = bool(jnp.result_type(float) == jnp.float64)

    def traced(avals: list[Any]) -> Any:
        rest: list[Any] = []

        def function(*operands: Any) -> list[Any]:
            # Beside arrays a `bwd` returns JAX's own marks, such as symbolic zeros.
            leaves, structure = jax.tree.flatten(call(bwd.call_wrapped, *operands))
            arrays = [x for x in leaves if isinstance(x, jax.Array)]
            marks = [None if isinstance(x, jax.Array) else x for x in leaves]
            rest[:] = marks, structure
            return arrays

        with jax.enable_x64(x64), jax.disable_jit(False):
            return jax.make_jaxpr(function)(*avals), *rest

    def apart(*operands: Any) -> Any:
        try:
            avals = [shaped(x.shape, x.dtype) for x in operands]
            with ThreadPoolExecutor(max_workers=1) as pool:
                closed, marks, structure = pool.submit(traced, avals).result()
        except Exception:  # its lines are lost, not its numbers
            return bwd.call_wrapped(*operands)
        arrays = iter(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *operands))
        leaves = [next(arrays) if mark is None else mark for mark in marks]
        return jax.tree.unflatten(structure, leaves)

    return lu.wrap_init(apart, debug_info=bwd.debug_info)
