"""The update rule by hand: stochastic gradient descent on a pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxgrad.pytrees import PyTree, as_params, kind_of, leaf_name

Schedule = Callable[[Array], Any]
"""A learning rate as a function of the step, whose first is 0, as optax has them."""


class SGDState(NamedTuple):
    """What one step leaves for the next.

    Attributes:
      step: how many updates were made.
      momentum_buffers: the structure of the parameters, with `None` for leaves that
        aren't trained; zeros at first.
    """

    step: Int[Array, ""]
    momentum_buffers: PyTree


def init_sgd(params: PyTree) -> SGDState:
    """The state before the first step: step 0, and momentum buffers of zeros.

    Args:
      params: any pytree; leaves that aren't arrays of floats get no buffer.

    Returns:
      The state for `sgd_update`.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> state = jaxgrad.init_sgd({"w": jnp.ones(2), "name": "ridge"})
      >>> print(state.step, state.momentum_buffers["w"], state.momentum_buffers["name"])
      0 [0. 0.] None
    """
    return SGDState(
        step=jnp.zeros((), jnp.int32),
        momentum_buffers=jax.tree.map(
            lambda p: jnp.zeros_like(p) if kind_of(p) == "differentiable" else None,
            as_params(params),
        ),
    )


def sgd_update(
    params: PyTree,
    *,
    grads: PyTree,
    state: SGDState,
    learning_rate: float | Float[ArrayLike, ""] | Schedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[PyTree, SGDState]:
    r"""`jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)`.

    That is the whole rule. With the options of `torch.optim.SGD`, for each parameter
    $p$ with gradient $g$ and momentum buffer $b$ (learning rate $\eta$, momentum
    $\mu$, dampening $\tau$, weight decay $\lambda$):

    $$g \leftarrow g + \lambda p$$
    $$b \leftarrow g \text{ at the first step, then } \mu b + (1 - \tau) g$$
    $$g \leftarrow g + \mu b \text{ with nesterov, else } b \quad (\mu \ne 0)$$
    $$p \leftarrow p - \eta g$$

    A leaf whose gradient is `None` (static, fixed or left out) stays as it is.

    Args:
      params: any pytree.
      grads: the gradient, as `jaxgrad.grad` gives it.
      state: from `init_sgd`, or from the step before.
      learning_rate: $\eta$: a number, a scalar array, or a function of the step, whose
        first is 0.
      momentum: $\mu \ge 0$, the same at every step of a run.
      dampening: $\tau$.
      weight_decay: $\lambda \ge 0$, an L2 penalty added to the gradient.
      nesterov: look ahead along the momentum; needs momentum, and no dampening.

    Returns:
      The new parameters, with the dtypes of the old, and the new state.

    Raises:
      ValueError: the trees or shapes differ; the learning rate, momentum or decay is
        negative or not finite; nesterov without momentum or with dampening. (Values
        are checked where they are known, which inside `jit` they may not be.)

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params, grads = {"w": jnp.array([0.5])}, {"w": jnp.array([-5.0])}
      >>> state = jaxgrad.init_sgd(params)
      >>> params, state = jaxgrad.sgd_update(
      ...     params, grads=grads, state=state, learning_rate=0.01)
      >>> print(params["w"], state.step)
      [0.55] 1

    Source: the algorithm of
    https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html; with
    dampening 0 it is `optax.sgd`. Nesterov: Sutskever et al. 2013,
    https://proceedings.mlr.press/v28/sutskever13.html
    """
    _check_options(momentum, dampening, weight_decay, nesterov)
    rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
    check_number("learning_rate", rate)

    def update(name: str, p: Any, g: Any, b: Any) -> tuple[Any, Any]:
        if g is None:
            return p, b
        _check_leaf(name, p, g, b)
        p, g = jnp.asarray(p), jnp.asarray(g)
        if weight_decay:
            g = g + weight_decay * p
        if momentum:
            b = _dampened(g, state.step, dampening) + momentum * b
            g = g + momentum * b if nesterov else b
        new = p - jnp.asarray(rate, g.dtype) * g
        return new.astype(p.dtype), b

    named, treedef = jax.tree_util.tree_flatten_with_path(as_params(params))
    leaves = [
        update(leaf_name(path), p, g, b)
        for (path, p), g, b in zip(
            named,
            _matching(treedef, grads, "grads"),
            _matching(treedef, state.momentum_buffers, "state.momentum_buffers"),
            strict=True,
        )
    ]
    return (
        jax.tree.unflatten(treedef, [p for p, _ in leaves]),
        SGDState(state.step + 1, jax.tree.unflatten(treedef, [b for _, b in leaves])),
    )


def _dampened(g: Array, step: Array, dampening: float) -> Array:
    """PyTorch's first buffer is the gradient itself; dampening starts at the second."""
    return jnp.where(step == 0, g, (1 - dampening) * g) if dampening else g


def _matching(treedef: Any, tree: PyTree, what: str) -> list[Any]:
    try:
        leaves: list[Any] = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{what} has not the structure of params, which is {treedef}; it is "
            f"{jax.tree.structure(tree)}. {error}"
        ) from None
    return leaves


def _check_leaf(name: str, p: Any, g: Any, b: Any) -> None:
    if kind_of(p) != "differentiable":
        raise ValueError(
            f"Leaf `{name}` is {kind_of(p)}, and can't be trained, but grads has a "
            f"{type(g).__name__} for it: None was expected."
        )
    for what, other in (("grads", g), ("state.momentum_buffers", b)):
        if jnp.shape(other) != jnp.shape(p):
            raise ValueError(
                f"Leaf `{name}` has shape {jnp.shape(p)} in params and "
                f"{jnp.shape(other)} in {what}. They must be equal."
            )


def _check_options(
    momentum: float, dampening: float, weight_decay: float, nesterov: bool
) -> None:
    check_number("momentum", momentum)
    check_number("weight_decay", weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            "nesterov needs a momentum above 0 and a dampening of 0; momentum is "
            f"{momentum} and dampening is {dampening}."
        )


def check_number(name: str, value: Any) -> None:
    """Raises ValueError unless a value, where it's known, is one finite number >= 0."""
    if isinstance(value, jax.core.Tracer):
        return
    if np.shape(value) != ():
        raise ValueError(f"{name} must be one number, and has shape {np.shape(value)}.")
    if not 0 <= float(value) < np.inf:
        raise ValueError(f"{name} must be finite and not negative, and is {value}.")
