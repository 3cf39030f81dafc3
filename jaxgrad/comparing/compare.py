"""The call: `compare_with_torch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxgrad.comparing.comparison import Comparison
from jaxgrad.comparing.jax_side import JaxSide
from jaxgrad.comparing.report import TorchComparison
from jaxgrad.comparing.sides import TorchModel
from jaxgrad.comparing.torch_side import import_torch, kept, tensors_of
from jaxgrad.comparing.trajectories import check_optimizers
from jaxgrad.comparing.trajectories.moving import moves
from jaxgrad.pytrees import Loss, PyTree


def compare_with_torch(
    loss: Loss,
    params: PyTree,
    *args: Any,
    module: Any,
    torch_loss: Callable[..., Any],
    torch_args: Sequence[Any] | None = None,
    mapping: Mapping[str, Any] | None = None,
    steps: int = 0,
    optimizer: Any = None,
    torch_optimizer: Callable[[list[Any]], Any] | None = None,
    exact: bool = False,
    rtol: float | None = None,
    has_aux: bool = False,
) -> TorchComparison:
    r"""Compares a JAX loss with the same model in PyTorch: does it have its gradients?

    The parameters are paired by their contents, whatever their names and layouts: each
    JAX leaf is a linear map $M$ of PyTorch's parameters, $p = M\theta$, so that
    PyTorch's gradient should be $\partial L / \partial \theta = M^T \, \partial L /
    \partial p$. Then the values, each submodule's output, the loss and the gradients
    are compared; where float32 gradients differ, both sides run in float64, so that
    rounding is told from a mistake. Of a mistake the report says where the two part,
    and why: each cause was tested by running PyTorch again with that one change.

    The module is left as it was found: parameters, gradients, buffers, modes, random
    state.

    Args:
      loss: JAX's loss, `loss(params, *args)`, a real scalar.
      params: any pytree, its leaves of floats the same numbers as the module's
        parameters, in any layout.
      *args: the rest of the loss's arguments.
      module: the `torch.nn.Module`, on the CPU.
      torch_loss: PyTorch's loss, `torch_loss(module, *torch_args)`, a scalar tensor.
      torch_args: what it takes after the module; by default `args` as tensors, copied:
        floats keep their dtype, integers become int64.
      mapping: for leaves that their contents don't settle: a leaf's path to the
        parameter's name, or to that and a function from PyTorch's array to JAX's.
      steps: compare so many steps of an optimizer too.
      optimizer: an optax optimizer; by default SGD on both sides, with a learning rate
        of 0.01: `jaxgrad.sgd_update`, `optax.sgd`, `torch.optim.SGD`.
      torch_optimizer: a function that makes PyTorch's of a list of parameters.
      exact: run both sides in float64 in any case.
      rtol: how far apart gradients may be, of their norm; by default 1e-6, in float64
        where both sides can run in it.
      has_aux: the JAX loss returns `(loss, aux)`.

    Returns:
      A `TorchComparison`. It is true if the values, the loss, all gradients and the
      trajectories agree.

    Raises:
      ImportError: PyTorch isn't installed, or is older than 2.4.
      TypeError: the module has complex or integer parameters, or isn't one; a loss is
        no real scalar; an argument has no counterpart as a tensor.
      ValueError: no parameter fits a leaf; the module isn't on the CPU; `torch_loss`
        returns a detached tensor.

    Example:
      >>> import jax.numpy as jnp, jaxgrad, torch
      >>> module = torch.nn.Linear(3, 1)
      >>> params = {name: jnp.asarray(p.detach().numpy().copy())
      ...           for name, p in module.named_parameters()}
      >>> x = jnp.ones((8, 3))
      >>> loss = lambda p, x: jnp.sum((x @ p["weight"].T + p["bias"]) ** 2)
      >>> torch_loss = lambda module, x: (module(x) ** 2).mean()
      >>> found = jaxgrad.compare_with_torch(
      ...     loss, params, x, module=module, torch_loss=torch_loss)
      >>> bool(found), found.causes[0].kind
      (False, 'reduction')

    Source: Griewank and Walther, Evaluating Derivatives, 2nd edition, chapter 3 (the
    transpose of a linear map in reverse mode); PyTorch,
    https://docs.pytorch.org/docs/stable/notes/extending.html (function modes).
    """
    import_torch()
    check_module(module)
    check_optimizers(steps, optimizer, torch_optimizer)
    side = JaxSide(loss, params, args, has_aux=has_aux)
    tensors = tensors_of(args) if torch_args is None else tuple(torch_args)
    with kept(module):
        frozen = frozenset(
            name for name, p in module.named_parameters() if not p.requires_grad
        )
        for p in module.parameters():
            p.requires_grad_(True)
        model = TorchModel(module, torch_loss, tensors, frozen)
        comparison = Comparison(side, model, mapping or {}, rtol)
        report = comparison.report(exact)
        if steps:
            layouts = comparison.layouts
            trajectory = moves(side, model, layouts, steps, optimizer, torch_optimizer)
            report = replace(
                report,
                ok=report.ok and trajectory.ok,
                trajectory=trajectory,
                causes=(*report.causes, *trajectory.causes),
            )
    return report


def check_module(module: Any) -> None:
    """Raises an error unless a module's parameters can be compared."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, and is a {type(module).__name__}."
        )
    named = list(module.named_parameters())
    if not named:
        raise ValueError(
            f"The {type(module).__name__} has no parameters, so that there is nothing "
            "to compare."
        )
    for name, p in named:
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise ValueError(
                f"`{name}` isn't initialized yet: run the module once before."
            )
        if not p.is_floating_point():
            raise TypeError(
                f"`{name}` has dtype {p.dtype}: only parameters of real floats are "
                "covered."
            )
        if p.device.type != "cpu":
            raise ValueError(
                f"`{name}` is on {p.device}; the comparison runs on the CPU: "
                "module.cpu(), or copy.deepcopy(module).cpu() to keep it there."
            )
