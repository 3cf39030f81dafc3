"""Moves the parameters of both sides, step by step, each by its own optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxgrad.pytrees import PyTree
from jaxgrad.training import update_rule

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

LEARNING_RATE = 0.01
"""That of the three optimizers that run where none is given."""


class JaxMover(NamedTuple):
    """A loss in JAX.

    Attributes:
      start: the trained leaves, by path.
      value_and_grad: leaves to the loss and its gradients, by path.
      unflatten: leaves to the pytree that an optimizer is given, with `None` for what
        isn't trained.
      flatten: the way back.
      to_torch: leaves to PyTorch's parameters, by name. What it leaves out isn't
        compared.
      gradients_to_torch: the same for gradients.
    """

    start: Mapping[str, Array]
    value_and_grad: Callable[[Arrays], tuple[Any, Mapping[str, Any]]]
    unflatten: Callable[[dict[str, Any]], PyTree]
    flatten: Callable[[PyTree], Mapping[str, Any]]
    to_torch: Callable[[Arrays], Arrays]
    gradients_to_torch: Callable[[Arrays], Arrays]


class TorchMover(NamedTuple):
    """A loss in PyTorch.

    Attributes:
      start: the values that the parameters begin with, by name.
      parameters: the module's own, which are moved; the caller puts them back.
      loss: the loss where they stand, a scalar with its graph; the same each time.
    """

    start: Mapping[str, Array]
    parameters: Mapping[str, Any]
    loss: Callable[[], Any]


class Mover(NamedTuple):
    """An optimizer in JAX: a state, and a compiled step."""

    init: Callable[[PyTree], PyTree]
    step: Callable[..., tuple[PyTree, PyTree]]


class JaxStep(NamedTuple):
    """One step of JAX's: arrays by PyTorch's names, and the whole gradient's 2-norm."""

    loss: float
    norm: float
    before: Arrays
    gradients: Arrays
    after: Arrays


class TorchStep(NamedTuple):
    """One step of PyTorch's.

    Attributes:
      loss: before the step.
      before: the parameters.
      after: the parameters.
      left_over: parameters whose gradient `zero_grad` has left.
    """

    loss: float
    before: Arrays
    after: Arrays
    left_over: list[str]


def mover_of(optimizer: Any) -> Mover:
    """Prepares an optax transformation; `None` is `jaxgrad.sgd_update`."""
    init, update = update_rule(None, optimizer)

    def no_search(_: PyTree) -> Any:
        raise ValueError(
            "The optimizer evaluates the loss by itself (a line search): its steps "
            "can't be compared with those of a gradient."
        )

    def step(params: PyTree, grads: PyTree, state: PyTree, value: Any) -> Any:
        return update(params, grads, state, LEARNING_RATE, value, no_search)

    compiled = jax.jit(step)

    def move(*given: Any) -> Any:
        try:
            return compiled(*given)
        except jax.errors.JAXTypeError:  # it looks at values, as `if step > 10` does
            return step(*given)

    return Mover(init, move)


def jax_steps(side: JaxMover, mover: Mover) -> Iterator[JaxStep]:
    """JAX's steps, without an end."""

    def leaves_of(params: PyTree) -> Arrays:
        return {path: np.asarray(leaf) for path, leaf in side.flatten(params).items()}

    def tree_of(leaves: Mapping[str, Any]) -> PyTree:
        return side.unflatten({path: jnp.asarray(v) for path, v in leaves.items()})

    params = tree_of(side.start)
    state = mover.init(params)
    leaves = leaves_of(params)
    before = _wide(side.to_torch(leaves))
    while True:
        loss, found = side.value_and_grad(leaves)
        gradients = {path: np.asarray(g) for path, g in found.items()}
        given = params, tree_of(gradients), state, jnp.asarray(loss)
        params, state = mover.step(*given)
        leaves = leaves_of(params)
        after = _wide(side.to_torch(leaves))
        whole = float(np.linalg.norm([norm(g) for g in gradients.values()]))
        found = _wide(side.gradients_to_torch(gradients))
        yield JaxStep(float(loss), whole, before, found, after)
        before = after


def torch_steps(side: TorchMover, optimizer: Any) -> Iterator[TorchStep]:
    """PyTorch's steps, as people write them, without an end."""
    before = torch_values(side)
    while True:
        optimizer.zero_grad()
        held = names_of(side, optimizer)
        left_over = [
            name
            for name, p in side.parameters.items()
            if name in held and p.grad is not None and bool((p.grad != 0).any())
        ]
        loss = side.loss()
        loss.backward()
        optimizer.step()
        after = torch_values(side)
        yield TorchStep(float(loss.detach()), before, after, left_over)
        before = after


def torch_begin(side: TorchMover, make: Callable[[list[Any]], Any]) -> Any:
    """Puts the parameters where they begin, and makes an optimizer of them."""
    import torch

    with torch.no_grad():
        start = _wide(side.start)
        for name, parameter in side.parameters.items():
            parameter.copy_(torch.from_numpy(np.array(start[name])))
            parameter.grad = None
    optimizer = make(list(side.parameters.values()))
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            "torch_optimizer must return a torch.optim.Optimizer, and returned a "
            f"{type(optimizer).__name__}."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs = closure is not None and closure.default is inspect.Parameter.empty
    if needs or isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss by itself, through a "
            "closure: its steps can't be compared with those of a gradient."
        )
    return optimizer


def torch_values(side: TorchMover) -> Arrays:
    """PyTorch's parameters where they stand: copies."""
    return {name: _array(p) for name, p in side.parameters.items()}


def torch_gradients(side: TorchMover) -> dict[str, Array | None]:
    """PyTorch's gradients where the parameters stand; then it has none."""
    for p in side.parameters.values():
        p.grad = None
    side.loss().backward()
    found: dict[str, Array | None] = {}
    for name, p in side.parameters.items():
        dense = p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
        found[name] = None if dense is None else _array(dense)
        p.grad = None
    return found


def norm(array: Array) -> float:
    """The 2-norm of all entries, in float64."""
    return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))


def _array(tensor: Any) -> Array:
    """A tensor's numbers: a copy."""
    tensor = tensor.detach().cpu()
    wide = tensor if tensor.element_size() >= 4 else tensor.float()
    return np.array(wide.numpy())


def _wide(arrays: Mapping[str, Array]) -> Arrays:
    """Arrays of float32 or wider: PyTorch takes no other from NumPy in every case."""
    return {
        name: np.asarray(a, np.float32) if a.dtype.itemsize < 4 else a
        for name, a in arrays.items()
    }


def names_of(side: TorchMover, optimizer: Any) -> dict[str, Any]:
    """The parameters that an optimizer has, each with the options of its group."""
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    return {
        name: groups[id(p)] for name, p in side.parameters.items() if id(p) in groups
    }
