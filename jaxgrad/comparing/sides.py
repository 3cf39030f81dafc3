"""Both sides of a comparison at one point: losses and gradients in some precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxgrad.comparing.jax_side import JaxSide, Traced, Values
from jaxgrad.comparing.links import Link, Measure, measured
from jaxgrad.comparing.torch_side import (
    Rewrite,
    Run,
    array_of,
    doubled,
    gradients_of,
    run_torch,
    to_double,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A module, its loss and the loss's arguments, in some precision.

    Attributes:
      module: the module, whose parameters all ask for gradients.
      loss: `loss(module, *args)`.
      args: tensors.
      frozen: the parameters that don't ask for gradients, as the user has them.
      wide: whether all of it is in float64.
    """

    module: Any
    loss: Callable[..., Any]
    args: tuple[Any, ...]
    frozen: frozenset[str]
    wide: bool = False

    def run(self, rewrites: Mapping[int, Rewrite] | None = None) -> Run:
        """One run of the loss."""
        for p in self.module.parameters():
            p.grad = None
        return run_torch(self.module, self.loss, self.args, rewrites, wide=self.wide)

    def gradients(self, run: Run) -> dict[str, Array | None]:
        """The gradient of each parameter; `None` where the loss doesn't depend on it.

        Frozen ones have theirs too: see `shown`.
        """
        named = list(self.module.named_parameters())
        got = gradients_of(run, [p for _, p in named])
        return {
            name: None if g is None else array_of(g)
            for (name, _), g in zip(named, got, strict=True)
        }

    def shown(
        self, gradients: Mapping[str, Array | None], thawed: Collection[str] = ()
    ) -> dict[str, Array | None]:
        """The gradients that the user sees: frozen parameters have none."""
        hidden = self.frozen - set(thawed)
        return {n: None if n in hidden else g for n, g in gradients.items()}


@dataclass(frozen=True, eq=False)
class Both:
    """Both sides, run once.

    Attributes:
      model: PyTorch's side.
      run: its run.
      theirs: its gradients, by parameter, those of frozen ones too.
      traced: JAX's side.
      values: its run.
      wide: whether both are in float64.
    """

    model: TorchModel
    run: Run
    theirs: dict[str, Array | None]
    traced: Traced
    values: Values
    wide: bool

    @property
    def losses(self) -> tuple[float, float]:
        """JAX's loss and PyTorch's."""
        return self.values.loss, float(self.run.loss.detach())

    @cached_property
    def scale(self) -> float:
        """The norm of JAX's whole gradient."""
        return whole_norm(self.values.gradients)

    def measures(self, links: Sequence[Link]) -> list[Measure]:
        """How far each link's gradients are apart."""
        theirs = self.model.shown(self.theirs)
        return compare_all(links, self.values.gradients, theirs)


def compare_all(
    links: Sequence[Link],
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array | None],
) -> list[Measure]:
    """Measures each link; a gradient that PyTorch hasn't is zero."""
    return [measured(link, ours, _Full(link, theirs)) for link in links]


class _Full(dict[str, Array]):
    """PyTorch's gradients of a link's parameter, with zeros for `None`."""

    def __init__(self, link: Link, theirs: Mapping[str, Array | None]) -> None:
        gradient = theirs.get(link.name)
        super().__init__()
        if gradient is not None:
            self[link.name] = gradient
        else:
            self[link.name] = np.zeros(link.size, np.float32).reshape(link.torch_shape)


def whole_norm(gradients: Mapping[str, Array]) -> float:
    """The norm of all gradients together."""
    squares = 0.0
    for gradient in gradients.values():
        flat = gradient.reshape(-1)
        if gradient.dtype not in (np.float32, np.float64):
            flat = flat.astype(np.float32)
        squares += float(np.dot(flat, flat))
    return float(squares**0.5)


def natively(model: TorchModel, side: JaxSide) -> Both:
    """Both sides in their own dtypes."""
    run = model.run()
    traced = side.native
    return Both(model, run, model.gradients(run), traced, traced(), wide=False)


class Refused(Exception):
    """A side can't be run in float64; the text says which, and why."""


@contextlib.contextmanager
def in_double(model: TorchModel, side: JaxSide) -> Iterator[Both]:
    """Both sides in float64; within `kept`, which puts the module back.

    Raises:
      Refused: one of them can't.
    """
    with jax.enable_x64(True):
        try:
            traced = side.wide
            values = traced()
        except Exception as error:
            raise Refused(f"The JAX loss can't be run in float64: {error}") from error
        if not np.isfinite(values.loss) and np.isfinite(side.native().loss):
            raise Refused("The JAX loss isn't finite in float64.")
        try:
            to_double(model.module)
            wide = TorchModel(
                model.module, model.loss, doubled(model.args), model.frozen, wide=True
            )
            run = wide.run()
            if str(run.loss.dtype) != "torch.float64":
                raise Refused(
                    f"torch_loss returns {run.loss.dtype} for a module of float64."
                )
            theirs = wide.gradients(run)
        except Refused:
            raise
        except Exception as error:
            raise Refused(
                f"The PyTorch module can't be run in float64: {error}"
            ) from error
        yield Both(wide, run, theirs, traced, values, wide=True)
