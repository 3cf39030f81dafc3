"""What a port of the corpus is: a PyTorch module, a JAX loss, and what's wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch


class Problem(NamedTuple):
    """What `compare_with_torch` is given."""

    loss: Callable[..., Any]
    params: Any
    args: tuple
    module: torch.nn.Module
    torch_loss: Callable[..., torch.Tensor]
    options: dict[str, Any] = {}  # noqa: RUF012
    """`torch_args`, `mapping`, `steps`, `optimizer`, `torch_optimizer`, `has_aux`."""


class Port(NamedTuple):
    """A port that is right (`kind` is empty), or wrong in one known way.

    Attributes:
      name: unique; `module-what_is_wrong`, or `module` alone for the right one.
      make: builds the problem anew: a fresh module and fresh arrays.
      kind: what is wrong: the kind of the cause that should come first. Several,
        between bars, if more than one word is fair: `reduction|factor`.
      where: PyTorch module paths, parameter names or leaf paths, one of which must be
        named: by `first_difference.module`, or by a bad row of `parameters`. Empty if
        nothing needs naming: the loss's own reduction, an optimizer.
    """

    name: str
    make: Callable[[], Problem]
    kind: str = ""
    where: tuple[str, ...] = ()


def compare(problem: Problem, **more: Any) -> Any:
    """Runs the comparison."""
    import jaxgrad

    return jaxgrad.compare_with_torch(
        problem.loss,
        problem.params,
        *problem.args,
        module=problem.module,
        torch_loss=problem.torch_loss,
        **{**problem.options, **more},
    )


def arrays_of(module: torch.nn.Module) -> dict[str, jax.Array]:
    """The parameters of a module as JAX arrays, copied, by their names."""
    return {name: as_jax(p) for name, p in module.named_parameters()}


def as_jax(tensor: torch.Tensor) -> jax.Array:
    """A tensor as a JAX array, copied; bfloat16 too."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.float().numpy().copy(), jnp.bfloat16)
    return jnp.asarray(tensor.numpy().copy())


def draw(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Normal numbers, float32; the same ones wherever they are drawn."""
    numbers = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(numbers, jnp.float32)


def labels(seed: int, shape: int | tuple[int, ...], classes: int) -> jax.Array:
    """Class numbers."""
    numbers = np.random.default_rng(seed).integers(0, classes, shape)
    return jnp.asarray(numbers, jnp.int32)


def seeded(seed: int, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module with its weights drawn from a seed; torch's own seed is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
