"""Leaves of a pytree: their names, what can be differentiated, and what can't."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Loss = Callable[..., Any]
Kind = Literal["differentiable", "fixed", "static", "integer", "complex", "foreign"]


def leaf_name(path: tuple[Any, ...], root: str = "") -> str:
    """Writes a key path as Python would: `layers[0].weight`; the root is `params`."""
    name = root
    for key in path:
        part = getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))
        if isinstance(part, str) and part.isidentifier():
            name += f".{part}" if name else part
        else:
            name += f"[{part!r}]"
    return name or "params"


def operand_name(path: tuple[Any, ...]) -> str:
    """Names a leaf of `(params, *args)`: `layers[0].weight`, or `args[0].image`."""
    place = path[0].idx
    return leaf_name(path[1:], f"args[{place - 1}]" if place else "")


def is_array(leaf: Any) -> bool:
    """Says if a leaf is an array of numbers: JAX's (tracers too) or NumPy's."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSUMm"  # objects, texts, dates
    return isinstance(leaf, jax.Array)


def kind_of(leaf: Any) -> Kind:
    """Sorts a leaf by what a gradient can do with it.

    - `differentiable`: an array of floats.
    - `fixed`: the state of a random generator, which is held: typed keys, and
      `uint32` arrays (raw keys, the counters of Flax NNX's `Rngs`).
    - `static`: no array at all: a callable, a string, a flag, a Python number.
    - `integer` (booleans too), `complex`: arrays without a real gradient.
    - `foreign`: an array that JAX doesn't know (a `torch.Tensor`, text).
    """
    if not is_array(leaf):
        return "foreign" if hasattr(leaf, "__array__") else "static"
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return "differentiable"
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32:
        return "fixed"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    if jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_:
        return "integer"
    return "foreign"


def as_params(params: PyTree) -> PyTree:
    """Makes an array of a Python float that stands alone as `params`.

    Inside a tree a Python float is static, as in Equinox (a dropout rate, an
    epsilon); alone it can only be the parameter, as in `grad(f)(3.0)`.
    """
    return jnp.asarray(params) if isinstance(params, float) else params


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits `params` into what is trained and what is held; `combine` undoes it.

    Both have the structure of `params`, with `None` where the other has its leaves.

    Raises:
      TypeError: a leaf has no real gradient (integers, booleans, complex
        numbers, another library's arrays), or no leaf has one.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    kinds = [kind_of(leaf) for _, leaf in named]
    for (path, leaf), kind in zip(named, kinds, strict=True):
        if kind in ("integer", "complex", "foreign"):
            raise TypeError(_no_gradient(leaf_name(path), leaf, kind))
    if "differentiable" not in kinds:
        raise TypeError(nothing_to_differentiate(named, kinds))
    both = [
        (kind == "differentiable", leaf)
        for kind, (_, leaf) in zip(kinds, named, strict=True)
    ]
    return (
        jax.tree.unflatten(treedef, [leaf if yes else None for yes, leaf in both]),
        jax.tree.unflatten(treedef, [None if yes else leaf for yes, leaf in both]),
    )


def combine(trained: PyTree, held: PyTree) -> PyTree:
    """The whole tree that `partition` split."""
    return jax.tree.map(
        lambda t, h: h if t is None else t,
        trained,
        held,
        is_leaf=lambda leaf: leaf is None,
    )


def _no_gradient(name: str, leaf: Any, kind: Kind) -> str:
    if kind == "foreign":
        return f"Leaf `{name}` is {foreign(leaf)}."
    where = "params" if name == "params" else f"Leaf `{name}` of params"
    what = f"{where} has dtype {leaf.dtype} and shape {leaf.shape}"
    if kind == "complex":
        return (
            f"{what}: complex parameters aren't covered. Hold the real and the "
            "imaginary part as two real leaves, and join them inside the loss."
        )
    return (
        f"{what}: an array of integers or booleans has no gradient. If it is meant to "
        f"be trained, make it floating: `jnp.asarray({name}, jnp.float32)`. If not, "
        "split it off and pass it in *args, which aren't differentiated: "
        "`loss(params, rest, x, y)` (Equinox: `eqx.partition(model, "
        "eqx.is_inexact_array)`; Flax NNX: `nnx.split(model, nnx.Param, ...)`)."
    )


def nothing_to_differentiate(named: list[tuple[Any, Any]], kinds: list[Kind]) -> str:
    """Says why a tree has nothing to differentiate, and what to do."""
    if not named:
        return "params has no leaves, so there is nothing to differentiate."
    (path, leaf), kind = named[0], kinds[0]
    what = str(leaf.dtype) if is_array(leaf) else type(leaf).__name__
    numbers = [(p, v) for p, v in named if type(v) in (int, float)]
    if numbers:
        path, leaf = numbers[0]
        name = leaf_name(path)
        return (
            "params has no array of floats, so there is nothing to differentiate. "
            f"Leaf `{name}` is the Python number {leaf!r}, which is static, as in "
            f"Equinox. To differentiate it, write `jnp.asarray({float(leaf)!r})`."
        )
    return (
        "params has no array of floats, so there is nothing to differentiate: its "
        f"{len(named)} leaves are static or held fixed (`{leaf_name(path)}` is "
        f"{kind}: {what}). params is the loss's first argument."
    )


def foreign(leaf: Any) -> str:
    """Says what an array of another library is, and how to make it JAX's."""
    kind = f"{type(leaf).__module__.partition('.')[0]}.{type(leaf).__qualname__}"
    if isinstance(leaf, np.ndarray | np.generic):
        return f"an array of dtype {leaf.dtype}, which isn't one of numbers"
    convert = "leaf.detach().cpu().numpy()" if kind.startswith("torch") else "leaf"
    return f"a {kind}, not a JAX or NumPy array: pass `jnp.asarray({convert})`"


def function_name(function: Loss) -> str:
    """A function's name, file and line, for messages: `` `mse` (train.py, line 3)``."""
    name = getattr(function, "__name__", type(function).__name__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return f"`{name}`"
    return (
        f"`{name}` ({os.path.basename(code.co_filename)}, line {code.co_firstlineno})"
    )


def loss_and_aux(loss: Loss, value: Any, has_aux: bool) -> tuple[Any, Any]:
    """Checks what a loss returned, and gives it as `(loss, aux)`.

    Raises:
      TypeError: not a real number, or a tuple where none was announced.
      ValueError: an array where a scalar is needed.
    """
    who = f"The loss {function_name(loss)}"
    aux = None
    if has_aux:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise TypeError(
                f"{who} should return a pair (loss, aux), since has_aux=True, and "
                f"returned {_what(value)}."
            )
        value, aux = value
    if isinstance(value, tuple):
        raise TypeError(
            f"{who} returned a tuple of {len(value)}. If it is (loss, aux), pass "
            "has_aux=True; otherwise return the loss alone."
        )
    if not (is_array(value) or type(value) in (int, float, bool, complex)):
        hint = " Is its `return` missing?" if value is None else ""
        raise TypeError(
            f"{who} returned {_what(value)}; a real scalar was expected.{hint}"
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != ():
        size = int(np.prod(shape))
        how = (
            "It has one element: return `loss.squeeze()`."
            if size == 1
            else f"Reduce its {size} elements: `jnp.mean(loss)` or `jnp.sum(loss)`."
        )
        raise ValueError(
            f"{who} returned an array of shape {shape}; a scalar, of shape (), was "
            f"expected. {how}"
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{who} returned a complex number ({dtype}); a real one was expected. "
            "Return `jnp.abs(loss) ** 2` or `loss.real`, whichever is meant."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{who} returned {dtype}; a floating number was expected. Integers and "
            "booleans have no gradient: look for a comparison, an argmax or a cast."
        )
    return value, aux


def _what(value: Any) -> str:
    if is_array(value):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


class Static(NamedTuple):
    """A pytree without its arrays: hashable, so that `jax.jit` can tell two apart."""

    treedef: Any
    leaves: tuple[tuple[type, Any] | None, ...]
    """Per leaf: its type and value, or `None` where an array stands."""


def split_static(operands: tuple[Any, ...]) -> tuple[list[Any], Static]:
    """Splits `(params, *args)` into its arrays and the rest, which compilation keys on.

    Raises:
      TypeError: a leaf is neither an array nor hashable, or it's an array of
        another library.
    """
    leaves, treedef = jax.tree.flatten(operands)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    static = tuple(
        None if is_array(leaf) else _key(operands, place, leaf)
        for place, leaf in enumerate(leaves)
    )
    return arrays, Static(treedef, static)


def _key(operands: tuple[Any, ...], place: int, leaf: Any) -> tuple[type, Any]:
    # The type, since True == 1 == 1.0; the hex, since -0.0 == 0.0 and nan != nan.
    key = (type(leaf), leaf.hex() if type(leaf) is float else leaf)
    if kind_of(leaf) == "foreign":
        trouble = f"{foreign(leaf)}."
    else:
        try:
            hash(key)
            return key
        except TypeError:
            trouble = (
                f"a {type(leaf).__name__}, which is neither an array nor hashable, so "
                "that no compiled function can be kept for it. Make it an array, a "
                "tuple, or a hashable object."
            )
    path, _ = jax.tree_util.tree_leaves_with_path(operands)[place]
    raise TypeError(f"Leaf `{operand_name(path)}` is {trouble}")


def static_value(key: tuple[type, Any]) -> Any:
    """The leaf that a key in `Static.leaves` stands for."""
    return float.fromhex(key[1]) if key[0] is float else key[1]


def merge_static(arrays: list[Any], static: Static) -> tuple[Any, ...]:
    """Undoes `split_static`."""
    stock = iter(arrays)
    return static.treedef.unflatten(  # type: ignore[no-any-return]
        next(stock) if key is None else static_value(key) for key in static.leaves
    )
