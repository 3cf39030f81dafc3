"""What a case of the corpus is, and how to run it: natively, wider, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxgrad.pytrees import kind_of, leaf_name

Plant = Callable[[Callable], Callable]


class Problem(NamedTuple):
    loss: Callable[..., Any]
    params: Any
    args: tuple = ()
    trust: tuple[Callable, ...] = ()
    """The loss's custom rules that are meant to differ from the derivative."""


class Case(NamedTuple):
    name: str
    make: Callable[[Plant], Problem]
    """Puts one inner function, which a break can be planted on, through the plant.

    Its first argument depends on the parameters.
    """
    expect: Mapping[str, str] = MappingProxyType({})
    """Leaf name to verdict, where it isn't `right`."""
    x64: bool = False
    """Built and run under `jax.enable_x64`."""
    twin: Callable[..., torch.Tensor] | None = None
    """The same loss in PyTorch: `twin(*leaves, *args)`, leaves in JAX's order."""
    stopped: bool = False
    """A `stop_gradient` or a trusted rule holds back part of the derivative."""

    def build(self, plant: Plant = lambda function: function) -> Problem:
        with jax.enable_x64(self.x64):
            return self.make(plant)


def case(shelf: list[Case], **options: Any) -> Callable:
    """Puts a case on a shelf, under the name of the function that builds it."""

    def add(make: Callable[[Plant], Problem]) -> Callable[[Plant], Problem]:
        shelf.append(Case(make.__name__, make, **options))
        return make

    return add


def draw(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Normal numbers, float32; the same ones wherever they are drawn."""
    numbers = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(numbers, jnp.float32)


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options: so small a program takes longer to compile than to run."""


class Compiled(NamedTuple):
    """The loss and its gradient as a function of the leaves that have a gradient."""

    function: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    """`function(values, args)`."""
    values: dict[str, Any]
    """The differentiable leaves at the case's point, by their names."""


def compiled(loss: Callable, params: Any) -> Compiled:
    """What `jax.value_and_grad` gives, leaf by leaf."""
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in named]
    chosen = {
        leaf_name(path): (place, leaf)
        for place, (path, leaf) in enumerate(named)
        if kind_of(leaf) == "differentiable"
    }

    def of_chosen(values: dict[str, Any], args: tuple) -> Any:
        full = list(leaves)
        for name, value in values.items():
            full[chosen[name][0]] = value
        return loss(treedef.unflatten(full), *args)

    values = {name: leaf for name, (_, leaf) in chosen.items()}
    function = jax.jit(jax.value_and_grad(of_chosen), compiler_options=QUICK)
    return Compiled(function, values)


def gradients(loss: Callable, params: Any, *args: Any) -> dict[str, np.ndarray]:
    """What `jax.grad` gives for each leaf that is differentiable, by its name."""
    function, values = compiled(loss, params)
    _, of_leaves = function(values, args)
    return {name: np.asarray(of_leaves[name]) for name in values}


def labels(seed: int, count: int, classes: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, classes, count))


def widened(tree: Any) -> Any:
    """A tree with its arrays of floats in float64; to be used under `enable_x64`."""

    def widen(leaf: Any) -> Any:
        differentiable = kind_of(leaf) == "differentiable"
        return jnp.asarray(leaf, jnp.float64) if differentiable else leaf

    return jax.tree.map(widen, tree)


def torch_twin(case: Case) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The PyTorch twin as a function of the leaves alone, and the leaves in float64."""
    problem = case.build()
    twin = case.twin
    assert twin is not None, f"{case.name} has no twin"
    leaves = [_tensor(leaf) for leaf in jax.tree.leaves(problem.params)]
    args = [_tensor(leaf) for leaf in jax.tree.leaves(problem.args)]
    return lambda *values: twin(*values, *args), [x.requires_grad_() for x in leaves]


def _tensor(leaf: Any) -> torch.Tensor:
    wide = np.float64 if kind_of(leaf) == "differentiable" else np.int64
    return torch.tensor(np.asarray(leaf).astype(wide))
