"""Compiled gradients of a loss: `grad` and `value_and_grad`, checked while tracing."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxgrad.placing import (
    Layout,
    check_devices,
    keep,
    layout_of,
    several_devices,
    writes_one,
)
from jaxgrad.pytrees import (
    Loss,
    PyTree,
    Static,
    as_params,
    combine,
    function_name,
    is_array,
    kind_of,
    loss_and_aux,
    merge_static,
    operand_name,
    partition,
    split_static,
    static_value,
)

Built = TypeVar("Built")


def grad(loss: Loss, has_aux: bool = False) -> Callable[..., Any]:
    r"""The gradient of a loss with respect to its parameters, as a compiled function.

    `grad(loss)(params, *args)` computes $\partial L / \partial p$ for each leaf $p$ of
    `params`: `jax.jit(jax.grad(loss))`, for parameters and arguments as people have
    them. See `value_and_grad`, which returns the loss as well, for what is taken and
    what is refused.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      has_aux: if true, the loss returns `(loss, aux)`.

    Returns:
      A function `(params, *args) -> gradient`, or `-> (gradient, aux)`.

    Example:
      >>> import jaxgrad
      >>> jaxgrad.grad(lambda w: w**2)(3.0)
      Array(6., dtype=float32, weak_type=True)
    """
    return _differentiated(loss, has_aux, with_value=False)


def value_and_grad(loss: Loss, has_aux: bool = False) -> Callable[..., Any]:
    r"""The loss and its gradient, as a compiled function.

    `value_and_grad(loss)(params, *args)` gives $L$ and $\partial L / \partial p$ for
    each leaf $p$ of `params`. It is `jax.jit(jax.value_and_grad(loss))` with three
    things added: it takes any pytree, it says clearly what it can't take, and it is
    compiled once per loss, for as long as the loss lives, so that it can be written
    inside a loop.

    In `params`, arrays of floats are differentiated. Leaves that are no arrays
    (callables, strings, flags, Python numbers) are static, and the state of random
    generators (keys, `uint32` arrays) is held fixed: in the gradient both are `None`,
    as in Equinox's `filter_grad`. The same leaves among `args` are static too, so that
    `train=True` is a flag that the loss can branch on. A new value of a static leaf
    compiles anew: pass a number that changes often as an array.

    Args:
      loss: a pure function `loss(params, *args)` that returns a real scalar.
      has_aux: if true, the loss returns `(loss, aux)`.

    Returns:
      A function `(params, *args) -> (value, gradient)`, or, with `has_aux`,
      `-> ((value, aux), gradient)`. `value` has shape `()`; `gradient` has the
      structure, shapes, dtypes and sharding of `params`, with `None` for static and
      fixed leaves.

    Raises:
      TypeError: (when called) a leaf of `params` is an array of integers, booleans or
        complex numbers; no leaf is an array of floats; the loss isn't a real number.
      ValueError: (when called) the loss is an array, not a scalar; arrays are on
        different devices.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = {"w": jnp.array([1.0, 2.0]), "name": "ridge"}
      >>> loss = lambda params, x: jnp.sum(params["w"] * x) ** 2
      >>> value, gradient = jaxgrad.value_and_grad(loss)(params, jnp.array([3.0, 4.0]))
      >>> print(value, gradient["w"], gradient["name"])
      121.0 [66. 88.] None

    Source: `jax.value_and_grad`,
    https://docs.jax.dev/en/latest/_autosummary/jax.value_and_grad.html
    """
    return _differentiated(loss, has_aux, with_value=True)


def differentiate(
    loss: Loss, params: PyTree, args: tuple[Any, ...], has_aux: bool
) -> tuple[Any, Any, PyTree]:
    """The loss, its aux and its gradient, to be called inside a trace, with checks."""
    trained, held = partition(params)

    def scalar(trained: PyTree) -> tuple[Any, Any]:
        # Rebuilt in this trace: Flax NNX lets a variable change only where it was made.
        inner = jax.tree.map(lambda leaf: leaf, args)
        return loss_and_aux(loss, loss(combine(trained, held), *inner), has_aux)

    (value, aux), gradient = jax.value_and_grad(scalar, has_aux=True)(trained)
    return value, aux, gradient


def _differentiated(
    loss: Loss, has_aux: bool, *, with_value: bool
) -> Callable[..., Any]:
    def build(get_loss: Callable[[], Loss]) -> _Compiled:
        def derivative(
            params: PyTree, args: tuple[Any, ...], layouts: tuple[Layout, ...] = ()
        ) -> Any:
            value, aux, gradient = differentiate(get_loss(), params, args, has_aux)
            if layouts:
                trained, held = partition(params)

                def again(trained: PyTree) -> PyTree:
                    whole = combine(trained, held)
                    return differentiate(get_loss(), whole, args, has_aux)[2]

                apart = writes_one(jax.make_jaxpr(again)(trained))
                gradient = keep(gradient, layouts, apart)
            if with_value:
                return ((value, aux) if has_aux else value), gradient
            return (gradient, aux) if has_aux else gradient

        return _Compiled(derivative)

    compiled = once_per_loss(loss, ("gradients", has_aux, with_value), build)
    fast = compiled.fast

    @functools.wraps(loss, updated=())
    def derivative(*operands: Any, **keywords: Any) -> Any:
        if keywords:
            raise TypeError(
                f"{function_name(loss)} was given the keyword "
                f"{next(iter(keywords))!r}. Pass it in its place in "
                "*args, or bind it once, outside of any loop: "
                "`functools.partial(loss, ...)`."
            )
        if not operands:
            raise TypeError("Call it as (params, *args): params is missing.")
        layouts = _layouts(operands[0]) if several_devices() else ()
        try:
            if compiled.only_arrays and not layouts:
                try:
                    return fast(*operands)
                except _NotOnlyArrays:
                    pass
                except TypeError:  # jit's, of a leaf that is no array; or the loss's
                    if all(map(is_array, jax.tree.leaves(operands))):
                        raise
                compiled.only_arrays = False
            params, *args = operands
            return compiled.general(*split_static((as_params(params), *args, layouts)))
        except ValueError:
            named = jax.tree_util.tree_leaves_with_path(operands)
            check_devices((operand_name(path), leaf) for path, leaf in named)
            raise

    return derivative  # `__wrapped__` keeps the loss alive as long as this function


def _layouts(params: PyTree) -> tuple[Layout, ...]:
    """The layouts of the leaves to differentiate; empty if all are on one device."""
    leaves = jax.tree.leaves(params)
    # Called at each call: what nobody has put anywhere is on one device.
    if not any(map(_is_committed, leaves)):
        return ()
    found = tuple(layout_of(x) for x in leaves if kind_of(x) == "differentiable")
    return found if any(found) else ()


def _is_committed(leaf: Any) -> bool:
    tracer = isinstance(leaf, jax.core.Tracer)  # has no such attribute
    return not tracer and getattr(leaf, "committed", False)


class _NotOnlyArrays(Exception):
    """Raised while tracing: an argument may be a Python number, which is static."""


class _Compiled:
    """One derivative of one loss, compiled in two ways.

    `fast` is a bare `jax.jit`, with nothing done per call: for arguments that are all
    arrays. `general` is keyed on the static leaves as well, and on the layouts of
    parameters that are spread over devices, which the gradient's leaves have too.
    `only_arrays` says whether `fast` has been enough so far.
    """

    def __init__(self, derivative: Callable[..., Any]) -> None:
        self.only_arrays = True
        self.fast = jax.jit(_only_arrays(derivative))
        self.general = jit_general(
            lambda tree: derivative(tree[0], tree[1:-1], tree[-1])
        )


def _only_arrays(derivative: Callable[..., Any]) -> Any:
    def traced(params: PyTree, *args: Any) -> Any:
        # jit has made tracers of Python numbers and flags; they show as weakly typed
        # scalars or as single booleans. A few arrays do too; `general` takes them.
        for leaf in jax.tree.leaves((params, args)):
            weak = getattr(leaf, "weak_type", False)  # typed keys have none
            if not is_array(leaf) or (
                leaf.shape == () and (weak or leaf.dtype == np.bool_)
            ):
                raise _NotOnlyArrays
        return derivative(params, args)

    return traced


def jit_general(
    function: Callable[[PyTree], Any],
) -> Callable[[list[Any], Static], Any]:
    """Compiles `function(tree)` for `split_static(tree)`, keyed on the static part.

    The caller is warned when one static leaf keeps changing, since each new value
    costs a compilation.
    """
    seen: list[Static] = []

    def traced(arrays: list[Any], static: Static) -> Any:
        if static not in seen:
            seen.append(static)
            if len(seen) == _MANY_STATICS:
                _warn_of_compilations(seen[-2], seen[-1])
        return function(merge_static(arrays, static))

    return jax.jit(traced, static_argnums=1)


# A flag has two values and a mode a few; a number that counts or decays soon has more.
_MANY_STATICS = 10


def _warn_of_compilations(before: Static, now: Static) -> None:
    if before.treedef != now.treedef:
        return
    paths = jax.tree_util.tree_leaves_with_path(
        now.treedef.unflatten(range(len(now.leaves)))
    )
    for (path, _), old, new in zip(paths, before.leaves, now.leaves, strict=True):
        if new is not None and old != new:
            warnings.warn(
                f"Compiled {_MANY_STATICS} times: the static leaf "
                f"`{operand_name(path)}` keeps changing (now "
                f"{static_value(new)!r:.40}). Pass a number that changes as an array, "
                "`jnp.asarray(number)`, to compile once.",
                stacklevel=2,
            )
            return


_per_loss: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = (
    weakref.WeakKeyDictionary()
)


def once_per_loss(
    loss: Loss, key: Hashable, build: Callable[[Callable[[], Loss]], Built]
) -> Built:
    """Builds something once per loss and key, and keeps it while the loss lives.

    `build` is given a function that returns the loss: what it builds must not hold the
    loss itself, or neither would ever go. A bound method, a new object at each look,
    is kept under its object. A loss that can't be weakly referenced isn't kept, and one
    made anew each time (a lambda or a partial inside a loop) isn't found again.
    """
    if not callable(loss):
        raise TypeError(
            f"loss must be a function of (params, *args), and is a "
            f"{type(loss).__name__}."
        )
    method = isinstance(loss, types.MethodType)
    owner = getattr(loss, "__self__", None) if method else loss
    reference: Any = weakref.WeakMethod if method else weakref.ref
    try:
        entries = _per_loss.setdefault(owner, {"owner": weakref.ref(owner)})
        held = reference(loss)
    except TypeError:  # not hashable, or not weakly referenceable
        return build(lambda: loss)
    if entries["owner"]() is not owner:  # an equal one, which may die before this one
        return build(lambda: loss)
    key = (getattr(loss, "__func__", None) if method else None, key)
    if key not in entries:
        entries[key] = build(held)
    return entries[key]  # type: ignore[no-any-return]
