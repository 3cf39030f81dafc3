"""Runs optimizers on both sides of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.jax_side import JaxSide
from jaxgrad.comparing.layouts import Layout, put_back
from jaxgrad.comparing.links import added, links_of
from jaxgrad.comparing.sides import Refused, TorchModel, in_double
from jaxgrad.comparing.torch_side import array_of, run_torch
from jaxgrad.comparing.trajectories import compare as steps_of
from jaxgrad.pytrees import kind_of

Array = npt.NDArray[Any]


def moves(
    side: JaxSide,
    model: TorchModel,
    layouts: Sequence[Layout],
    steps: int,
    optimizer: Any,
    torch_optimizer: Callable[[list[Any]], Any] | None,
) -> steps_of.Trajectory:
    """Compares some steps of two optimizers: in float64, where both sides run in it."""
    with contextlib.ExitStack() as stack:
        try:
            both = stack.enter_context(in_double(model, side))
            traced, model = both.traced, both.model
        except Refused:
            stack.close()
            traced = side.native
        named = dict(model.module.named_parameters())
        for name in model.frozen:
            named[name].requires_grad_(False)
        start = {name: array_of(p) for name, p in named.items()}
        shapes = {name: a.shape for name, a in start.items()}
        links = links_of(layouts, shapes)
        dtype = np.float64 if traced.wide else None
        leaves = {
            n: np.asarray(leaf).astype(dtype or leaf.dtype)
            for n, leaf in side.leaves.items()
        }

        def value_and_grad(leaves: dict[str, Array]) -> Any:
            values = traced([leaves[name] for name in side.names])
            return values.loss, values.gradients

        def gradients_to_torch(gradients: dict[str, Array]) -> dict[str, Array]:
            out: dict[str, Array] = {}
            for link in links:
                found = added(link, gradients, link.torch_shape)
                out[link.name] = out[link.name] + found if link.name in out else found
            return out

        def to_torch(leaves: dict[str, Array]) -> dict[str, Array]:
            return _back(layouts, leaves, shapes)

        return steps_of.trajectories(
            steps_of.JaxMover(
                start=leaves,
                value_and_grad=value_and_grad,
                unflatten=lambda leaves: _unflatten(side, leaves),
                flatten=lambda params: _flatten(side, params),
                to_torch=to_torch,
                gradients_to_torch=gradients_to_torch,
            ),
            steps_of.TorchMover(
                start=start,
                parameters=named,
                loss=lambda: (
                    run_torch(
                        model.module,
                        model.loss,
                        model.args,
                        record=False,
                        wide=model.wide,
                    ).loss
                ),
            ),
            steps=steps,
            optimizer=optimizer,
            torch_optimizer=torch_optimizer,
        )


def _back(
    layouts: Sequence[Layout],
    leaves: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """PyTorch's parameters of the leaves: those that stand whole in them."""
    into: dict[str, Array] = {}
    filled: dict[str, int] = {}
    for layout in layouts:
        for piece in layout.pieces:
            name = piece.names[0]
            alone = len(piece.names) == 1 and layout.transform is None
            if not alone or filled.get(name, 0) >= int(np.prod(shapes.get(name, (0,)))):
                continue
            block = np.asarray(leaves[layout.path][piece.block])
            into.setdefault(name, np.zeros(shapes[name], block.dtype))
            put_back(piece, block, into)
            filled[name] = filled.get(name, 0) + block.size
    return {n: a for n, a in into.items() if filled[n] == a.size}


def _unflatten(side: JaxSide, leaves: Mapping[str, Any]) -> Any:
    """The parameters' tree, with `None` for what isn't trained."""
    stock: Iterator[Any] = iter([leaves[name] for name in side.names])
    return jax.tree.map(
        lambda leaf: next(stock) if kind_of(leaf) == "differentiable" else None,
        side.params,
    )


def _flatten(side: JaxSide, params: Any) -> dict[str, Any]:
    return dict(zip(side.names, jax.tree.leaves(params), strict=True))
