"""In how many digits a loss multiplies matrices, and its equations at the highest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad.equations import Place, bodies, equations, source_of
from jaxgrad.tables import Finding

_CONVOLUTION = "conv_general_dilated"
_PRODUCTS = ("dot_general", "ragged_dot_general", _CONVOLUTION)
# Words in the names of JAX's algorithms: the dtype, and the bits of its significand.
_WORDS = {
    "F8": ("float8", 4),
    "BF16": ("bfloat16", 8),
    "F16": ("float16", 11),
    "TF32": ("TF32", 11),
    "F32": ("float32", 24),
    "F64": ("float64", 53),
}
# By so many passes a number is taken as a sum of so many of the narrower dtype.
_PARTS = {"X3": 2, "X6": 3, "X9": 3}
# Three passes of TF32 have 22 bits, of float32's 24: all but the last digit.
_ALL_BUT = 2
# The first NVIDIA GPUs that have TF32: A100.
_AMPERE = (8, 0)


class Backend(NamedTuple):
    """What multiplies.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      capability: of an NVIDIA GPU, its compute capability; empty for all others.
    """

    platform: str
    capability: tuple[int, ...] = ()


class Product(NamedTuple):
    """A product in fewer digits than its operands, or the program's floats, have.

    Attributes:
      dtype: of its operands.
      digits: what they are multiplied in: `TF32`, `bfloat16 (BF16_BF16_F32)`.
      bits: of the significand there.
      asked: by whom: the backend's default; a precision, given in the call or by
        `jax.default_matmul_precision`; or a cast of the operands before.
      place: its line.
    """

    dtype: str
    digits: str
    bits: int
    asked: Literal["default", "precision", "cast"]
    place: Place

    @property
    def sentence(self) -> str:
        """What is multiplied in what, and where."""
        what = f"{self.dtype} matrices are multiplied in {self.digits}"
        return f"{what}, first in {self.place}"

    @property
    def remedy(self) -> str:
        """What gives all the digits."""
        around = '`jax.default_matmul_precision("highest")` around the call'
        if self.asked == "default":
            return around
        return f'`precision="highest"` there, or {around}'


def backend_of(arrays: Sequence[Any]) -> Backend:
    """Where a program of these arrays runs: where one is committed, or by default."""
    committed = [x for x in arrays if getattr(x, "committed", False)]
    device, *_ = (committed[0] if committed else jnp.zeros(())).devices()
    capability = str(getattr(device, "compute_capability", None))
    numbers = capability.split(".") if re.fullmatch(r"\d+\.\d+", capability) else []
    return Backend(device.platform, tuple(map(int, numbers)))


def in_force(
    operation: str, precision: Any, dtype: Any, backend: Backend
) -> tuple[str, int] | None:
    """In what a product of this dtype is computed, and its bits; `None` if in full.

    By default float32 is multiplied in bfloat16 on TPUs and in TF32 on NVIDIA GPUs that
    have it: https://docs.jax.dev/en/latest/201/precision.html, `jax.lax.Precision`.

    Args:
      operation: the primitive's name.
      precision: its parameter: `None`, levels, or an algorithm.
      dtype: float32 or float64.
      backend: what multiplies.
    """
    algorithm = isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)
    if algorithm and operation == _CONVOLUTION:  # where JAX takes it for the default
        algorithm, precision = False, None
    if algorithm and precision is not lax.DotAlgorithmPreset.DEFAULT:
        digits, bits = _named(precision)
        # XLA's CPU backend ignores algorithms. JAX itself casts the operands to a dtype
        # that the algorithm takes: those of bfloat16 take float32.
        if backend.platform == "cpu" and dtype == np.float32 and "BF16" in digits:
            return None
    elif dtype == np.float32:
        levels = precision if isinstance(precision, tuple) else (lax.Precision.DEFAULT,)
        digits, bits = min((_level(p, backend) for p in levels), key=lambda x: x[1])
    else:
        return None
    return (digits, bits) if bits < _bits(dtype) - _ALL_BUT else None


def _level(level: Any, backend: Backend) -> tuple[str, int]:
    """What a level means on a backend."""
    if backend.platform == "tpu" and level == lax.Precision.DEFAULT:
        return "bfloat16", 8
    if backend.platform == "tpu" and level == lax.Precision.HIGH:
        return "three passes of bfloat16", 16
    if backend.capability >= _AMPERE and level != lax.Precision.HIGHEST:
        return "TF32", 11
    return "float32", 24


def _named(algorithm: Any) -> tuple[str, int]:
    """What an algorithm multiplies in, and its bits."""
    if isinstance(algorithm, lax.DotAlgorithm):
        sides = [
            (algorithm.lhs_precision_type, algorithm.lhs_component_count),
            (algorithm.rhs_precision_type, algorithm.rhs_component_count),
            (algorithm.accumulation_type, 1),
        ]
        bits, dtype = min((_bits(t) * count, np.dtype(t).name) for t, count in sides)
        return f"{dtype} (a DotAlgorithm)", bits
    words = algorithm.name.split("_")
    parts = _PARTS.get(words[-1], 1)
    known = [_WORDS[word] for word in words if word in _WORDS]
    (name, bits), kept = known[0], known[-1][1]
    return f"{name} ({algorithm.name})", min(bits * parts, kept)


def _bits(dtype: Any) -> int:
    return int(jnp.finfo(dtype).nmant) + 1  # type: ignore[no-untyped-call]


def products(closed: Any, backend: Backend) -> list[Product]:
    """The products of a jaxpr that have fewer digits, those inside others too."""
    return list(_products(closed, backend, ()))


def _products(
    closed: Any, backend: Backend, callers: tuple[Any, ...]
) -> Iterator[Product]:
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name in _PRODUCTS:
            yield from _product(eqn, backend, callers)
        for body in bodies(eqn):
            yield from _products(body, backend, (eqn, *callers))


def _product(eqn: Any, backend: Backend, callers: tuple[Any, ...]) -> Iterator[Product]:
    dtypes = [atom.aval.dtype for atom in eqn.invars[:2]]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return
    narrow, precision = min(dtypes, key=_bits), eqn.params["precision"]
    asked: Literal["default", "precision", "cast"] = "cast"
    found: tuple[str, int] | None = narrow.name, _bits(narrow)
    if narrow.itemsize >= 4:
        asked = "default" if precision is None else "precision"
        found = in_force(eqn.primitive.name, precision, narrow, backend)
    if found:
        place = source_of(eqn, *callers)
        yield Product(narrow.name, *found, asked, place)


def coarsest(found: Sequence[Product]) -> Product | None:
    """The first of those with the fewest digits that the backend or a precision made.

    What the program casts itself is written in it.
    """
    lowered = [product for product in found if product.asked != "cast"]
    return min(lowered, key=lambda product: product.bits, default=None)


def lowered(closed: Any, arrays: Sequence[Any]) -> Product | None:
    """The coarsest product of a jaxpr that runs on these arrays, if one is lowered."""
    return coarsest(products(closed, backend_of(arrays)))


def findings_of(product: Product | None) -> list[Finding]:
    """What to say of it."""
    if product is None:
        return []
    asked = "by this backend's default"
    if product.asked == "precision":
        asked = "as a precision there or around the call asks for"
    text = f"{product.sentence}, {asked}. They keep all digits with {product.remedy}"
    return [Finding("matmul_precision", "", text)]


def gradient_of(closed: Any, count: int) -> Any:
    """The equations of a scalar's gradient in its first `count` inputs."""

    def scalar(*inputs: Any) -> Any:
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *inputs)[0]

    gradient = jax.grad(scalar, argnums=tuple(range(count)))
    with jax.disable_jit(False):  # whatever the user's setting
        return jax.make_jaxpr(gradient)(*closed.in_avals)


def with_backward(closed: Any, count: int) -> Any:
    """The equations of a loss, or of its gradient if its own don't show all products.

    The products of the backward pass are those of the loss anew, at their precision; a
    custom rule's are its own.
    """
    names = {eqn.primitive.name for eqn in equations(closed)}
    hidden = any(name.startswith("custom_vjp_call") for name in names)
    return gradient_of(closed, count) if hidden else closed


def at_highest(closed: Any) -> Any:
    """The same equations, with every product at the highest precision.

    What a call or an algorithm asks for is replaced, which
    `jax.default_matmul_precision` wouldn't do.
    """
    eqns = [_at_highest(eqn) for eqn in closed.jaxpr.eqns]
    return closed.replace(jaxpr=closed.jaxpr.replace(eqns=eqns))


def _at_highest(eqn: Any) -> Any:
    if eqn.primitive.name in _PRODUCTS:
        highest = (lax.Precision.HIGHEST,) * 2
        return eqn.replace(params={**eqn.params, "precision": highest})
    if not bodies(eqn):
        return eqn

    def replaced(value: Any) -> Any:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            return at_highest(value)
        if isinstance(value, jax.extend.core.Jaxpr):
            return at_highest(jax.extend.core.ClosedJaxpr(value, ())).jaxpr
        return jax.tree.map(replaced, value) if isinstance(value, tuple) else value

    return eqn.replace(params={k: replaced(v) for k, v in eqn.params.items()})
