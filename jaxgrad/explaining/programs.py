"""Compiled functions of a loss: the gradient, the Hessian times a vector, Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxgrad.operands import Operands
from jaxgrad.pytrees import Loss, loss_and_aux

# Lanczos takes some 20 products, and more only where the largest eigenvalue is one of
# many alike; then what it has by now is as good for choosing a learning rate.
_PRODUCTS = 100


def programs_of(get_loss: Callable[[], Loss], has_aux: bool) -> tuple[Any, ...]:
    """Compiled `look`, `value` and `product`; each compiles when it is called.

    All take `(static, chosen, forward), values, fixed` and more. `forward`: the Hessian
    times a vector is forward mode over the gradient, or else by differences. A backward
    rule that calls a `custom_vjp` has no forward mode.
    """

    def loss_of(form: Any, fixed: list[Any]) -> Callable[[list[Any]], Any]:
        static, chosen, _ = form

        def scalar(values: list[Any]) -> Any:
            blank = [None] * (len(values) + len(fixed))
            operands = Operands(blank, static, (), chosen).merge(values, fixed)
            return loss_and_aux(get_loss(), get_loss()(*operands), has_aux)[0]

        return scalar

    def look(form: Any, values: list[Any], fixed: list[Any], rate: Any) -> Any:
        """Value, gradient, per leaf both norms and whether it moves, curvature."""
        value, gradient = jax.value_and_grad(loss_of(form, fixed))(values)
        new, stats = moved(values, gradient, rate), []
        for p, g, q in zip(values, gradient, new, strict=True):
            stats.append(jnp.stack([_norm(g), _norm(p), jnp.any(q != p)]))
        flat = _wide(ravel_pytree(gradient)[0])
        unit = flat / _positive(_norm(flat))
        bent = product(form, values, fixed, unit)
        curvature = (unit @ bent) / _positive(unit @ unit)
        return value, gradient, jnp.stack(stats), curvature

    def value(form: Any, values: Any, fixed: Any, gradient: Any, rate: Any) -> Any:
        return loss_of(form, fixed)(moved(values, gradient, rate))

    def product(form: Any, values: Any, fixed: Any, vector: Any) -> Any:
        flat, leaves_of = ravel_pytree(values)

        def gradient(flat: Any) -> Any:
            return ravel_pytree(jax.grad(loss_of(form, fixed))(leaves_of(flat)))[0]

        vector = vector.astype(flat.dtype)
        if form[-1]:
            return _wide(jax.jvp(gradient, (flat,), (vector,))[1])
        # A central difference errs by h**2, and by eps / h for rounding.
        h = (jnp.cbrt(coarsest(values)) * _positive(_norm(flat))).astype(flat.dtype)
        ahead, behind = gradient(flat + h * vector), gradient(flat - h * vector)
        return _wide(ahead - behind) / (2 * h)

    return tuple(jax.jit(f, static_argnums=0) for f in (look, value, product))


def moved(values: list[Any], gradient: list[Any], rate: Any) -> list[Any]:
    """The parameters after a step, in their own dtypes, as `sgd_update` has it."""
    return [p - rate.astype(g.dtype) * g for p, g in zip(values, gradient, strict=True)]


def coarsest(values: list[Any]) -> float:
    """The rounding error of the dtype with the fewest digits."""
    found = [jnp.finfo(x.dtype) for x in values]  # type: ignore[no-untyped-call]
    return max(float(info.eps) for info in found)


def _wide(x: Any) -> Any:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _positive(x: Any) -> Any:
    return jnp.where(x == 0, 1, x)


def _norm(x: Any) -> Any:
    """The 2-norm, scaled: neither 1e30 nor 1e-30 leaves float32 when squared."""
    largest = jnp.max(jnp.abs(_wide(x)), initial=0)
    return largest * jnp.sqrt(jnp.sum((_wide(x) / _positive(largest)) ** 2))


def lanczos(product: Any, given: tuple[Any, ...]) -> tuple[float | None, bool]:
    """The largest eigenvalue of the Hessian, and whether it has converged.

    Without reorthogonalisation, which would keep every vector: eigenvalues found twice
    do no harm to the largest. It errs by less than the residual that is looked at.
    """
    flat = _wide(ravel_pytree(given[1])[0])
    vector = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    vector, before, beta = vector / jnp.linalg.norm(vector), jnp.zeros_like(flat), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    largest, tolerance = None, math.sqrt(coarsest(given[1]))
    for _ in range(_PRODUCTS):
        rest = product(*given, vector) - beta * before
        alphas.append(float(rest @ vector))
        rest -= alphas[-1] * vector
        beta = float(jnp.linalg.norm(rest))
        if not math.isfinite(alphas[-1] + beta):
            return None, False
        off = np.diag(betas, 1)
        found, vectors = np.linalg.eigh(np.diag(alphas) + off + off.T)
        largest = float(found[-1])
        if beta * abs(vectors[-1, -1]) <= tolerance * np.abs(found).max():
            return largest, True
        betas.append(beta)
        before, vector = vector, rest / beta
    return largest, False
