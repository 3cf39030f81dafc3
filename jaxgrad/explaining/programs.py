"""Compiled functions of a loss: the gradient, the Hessian times a vector, Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.operands import Operands
from jaxgrad.placing import Layout, keep, writes_one
from jaxgrad.pytrees import Loss, loss_and_aux

# Lanczos takes some 20 products, and more only where the largest eigenvalue is one of
# many alike; then what it has by now is as good for choosing a learning rate.
_PRODUCTS = 100


class Form(NamedTuple):
    """What a loss's programs are compiled for, beside shapes and dtypes.

    Attributes:
      static: the leaves that are no arrays.
      chosen: the places of the leaves to differentiate.
      forward: the Hessian times a vector is forward mode over the gradient, or else by
        differences. A backward rule that calls a `custom_vjp` has no forward mode.
      layouts: of the leaves; all that is made like them has the same.
    """

    static: Any
    chosen: tuple[int, ...]
    forward: bool
    layouts: tuple[Layout, ...]


class Programs(NamedTuple):
    """Compiled functions of `(form, values, fixed, ...)`; each when it is called."""

    look: Any
    value: Any
    begin: Any
    advance: Any


def programs_of(get_loss: Callable[[], Loss], has_aux: bool) -> Programs:
    """The programs of a loss. Vectors are lists of leaves, never joined."""

    def loss_of(form: Form, fixed: list[Any]) -> Callable[[list[Any]], Any]:
        def scalar(values: list[Any]) -> Any:
            blank = [None] * (len(values) + len(fixed))
            whole = Operands(blank, form.static, (), form.chosen).merge(values, fixed)
            return loss_and_aux(get_loss(), get_loss()(*whole), has_aux)[0]

        return scalar

    def kept(vector: list[Any], form: Form, slope: Any = None, at: Any = ()) -> Any:
        """A vector in the leaves' layouts; `slope` made it, from the values `at`."""
        known = slope is not None and any(form.layouts)
        apart = known and writes_one(jax.make_jaxpr(slope)(at))
        return keep(vector, form.layouts, apart)

    def look(form: Form, values: list[Any], fixed: list[Any], rate: Any) -> Any:
        """Value, gradient, per leaf both norms and whether it moves, curvature."""
        value, gradient = jax.value_and_grad(loss_of(form, fixed))(values)
        gradient = kept(gradient, form, jax.grad(loss_of(form, fixed)), values)
        new, stats = moved(values, gradient, rate), []
        for p, g, q in zip(values, gradient, new, strict=True):
            stats.append(jnp.stack([_norm([g]), _norm([p]), jnp.any(q != p)]))
        whole = _positive(_norm(gradient))
        unit = [_wide(g) / whole for g in gradient]
        bent = product(form, values, fixed, unit)
        curvature = _inner(unit, bent) / _positive(_inner(unit, unit))
        return value, gradient, jnp.stack(stats), curvature

    def value(form: Form, values: Any, fixed: Any, gradient: Any, rate: Any) -> Any:
        return loss_of(form, fixed)(moved(values, gradient, rate))

    def product(form: Form, values: Any, fixed: Any, vector: list[Any]) -> list[Any]:
        slope = jax.grad(loss_of(form, fixed))
        if form.forward:
            way = [v.astype(p.dtype) for v, p in zip(vector, values, strict=True)]
            bent = jax.jvp(slope, (values,), (way,))[1]
            return kept([_wide(x) for x in bent], form, slope, values)  # type: ignore[no-any-return]
        # A central difference errs by h**2, and by eps / h for rounding.
        h = jnp.cbrt(coarsest(values)) * _positive(_norm(values))
        both = zip(values, vector, strict=True)
        steps = [(_wide(p), h.astype(_wide(p).dtype) * v, p.dtype) for p, v in both]
        ahead = slope([(p + step).astype(dtype) for p, step, dtype in steps])
        behind = slope([(p - step).astype(dtype) for p, step, dtype in steps])
        ends = zip(ahead, behind, strict=True)
        bent = [_wide(a - b) / (2 * h) for a, b in ends]
        return kept(bent, form, slope, values)  # type: ignore[no-any-return]

    def begin(form: Form, values: list[Any]) -> Any:
        """A random unit vector, and the vector before it: zero."""
        keys = jax.random.split(jax.random.key(0), len(values))
        like = [_wide(p) for p in values]
        both = zip(keys, like, strict=True)
        drawn = [jax.random.normal(k, p.shape, p.dtype) for k, p in both]
        norm = _positive(_norm(drawn))
        vector = kept([x / norm for x in drawn], form)
        return vector, kept([jnp.zeros_like(p) for p in like], form)

    def advance(
        form: Form, values: Any, fixed: Any, vector: Any, before: Any, beta: Any
    ) -> Any:
        """One step of Lanczos: the two new numbers, and the vector after this one."""
        rest = product(form, values, fixed, vector)
        rest = [r - beta * b for r, b in zip(rest, before, strict=True)]
        alpha = _inner(rest, vector)
        rest = [r - alpha * v for r, v in zip(rest, vector, strict=True)]
        beta = _norm(rest)
        return alpha, beta, [r / _positive(beta) for r in rest]

    # `begin` takes nothing of the values but their devices.
    return Programs(
        look=jax.jit(look, static_argnums=0),
        value=jax.jit(value, static_argnums=0),
        begin=jax.jit(begin, static_argnums=0, keep_unused=True),
        advance=jax.jit(advance, static_argnums=0),
    )


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


def _norm(leaves: list[Any]) -> Any:
    """The 2-norm, scaled: neither 1e30 nor 1e-30 leaves float32 when squared."""
    sizes = [jnp.max(jnp.abs(_wide(x)), initial=0) for x in leaves]
    largest = jnp.max(jnp.stack(sizes))
    squares = [jnp.sum((_wide(x) / _positive(largest)) ** 2) for x in leaves]
    return largest * jnp.sqrt(sum(squares))


def _inner(one: list[Any], other: list[Any]) -> Any:
    """The inner product of two vectors."""
    return sum(jnp.sum(a * b) for a, b in zip(one, other, strict=True))


def lanczos(
    programs: Programs, form: Form, values: list[Any], fixed: list[Any]
) -> tuple[float | None, bool]:
    """The largest eigenvalue of the Hessian, and whether it has converged.

    Without reorthogonalisation, which would keep every vector: eigenvalues found twice
    do no harm to the largest. It errs by less than the residual that is looked at.
    """
    vector, before = programs.begin(form, values)
    alphas: list[float] = []
    betas: list[float] = []
    beta: Any = np.float32(0)
    largest, tolerance = None, math.sqrt(coarsest(values))
    for _ in range(_PRODUCTS):
        alpha, beta, after = programs.advance(form, values, fixed, vector, before, beta)
        before, vector = vector, after
        alphas.append(float(alpha))
        last = float(beta)
        if not math.isfinite(alphas[-1] + last):
            return None, False
        off = np.diag(betas, 1)
        found, vectors = np.linalg.eigh(np.diag(alphas) + off + off.T)
        largest = float(found[-1])
        if last * abs(vectors[-1, -1]) <= tolerance * np.abs(found).max():
            return largest, True
        betas.append(last)
    return largest, False
