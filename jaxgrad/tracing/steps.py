"""One step of a traced loss: its line, its numbers, and what is inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.equations import Place, bind, frames_of
from jaxgrad.flow import (
    Frame,
    Line,
    Summary,
    backward_of,
    forward_of,
    is_number,
    line_of,
    opens,
)
from jaxgrad.placing import numbers_of

# So many numbers are shown as they are.
SMALL = 8


@dataclass(frozen=True, eq=False)
class Output:
    """One output of a step.

    Attributes:
      shape: its shape.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    _frame: Frame = field(repr=False)
    _variable: int = field(repr=False)

    @cached_property
    def value(self) -> np.ndarray | Summary | None:
        """Its value: the numbers if they are few; `None` for keys."""
        return shown(self._frame, self._frame.values[self._variable])

    @cached_property
    def cotangent(self) -> np.ndarray | Summary | None:
        """The gradient of the loss with respect to it; `None` if it has none."""
        return shown(self._frame, self._frame.cotangents.get(self._variable))


def shown(frame: Frame, array: Any) -> np.ndarray | Summary | None:
    """An array's numbers if they are few, else a summary."""
    if array is None or not is_number(array.dtype):
        return None
    return numbers_of(array) if np.size(array) <= SMALL else frame.summary(array)


@dataclass(frozen=True, eq=False)
class Step(Line):
    """One operation of a loss: a `Line` that has been evaluated.

    Attributes:
      inputs: a leaf's path, `args[0]`, a literal, or `#` and the number of a step.
      outputs: one for most operations.
      phase: `backward` for the steps of a rule's backward part, else `forward`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    phase: Literal["forward", "backward"]
    _frame: Frame = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.outputs[0].shape if self.outputs else ()

    @property
    def dtype(self) -> str:
        """The dtype of the first output."""
        return self.outputs[0].dtype if self.outputs else ""

    @property
    def value(self) -> np.ndarray | Summary | None:
        """The value of the first output: the numbers if they are few."""
        return self.outputs[0].value if self.outputs else None

    @property
    def cotangent(self) -> np.ndarray | Summary | None:
        """The gradient of the loss with respect to the first output, if it has one."""
        return self.outputs[0].cotangent if self.outputs else None

    @property
    def stack(self) -> tuple[Place, ...]:
        """All frames that it came from, the library's too, the innermost first."""
        lines = self._frame.node(self.number).lines
        return tuple(place for eqn in lines for place in frames_of(eqn))

    @cached_property
    def local_derivatives(self) -> tuple[float | None, ...]:
        """Of a step from scalars to a scalar: its derivative by each input.

        The cotangent of an input is the step's cotangent times this, so that a chain of
        scalars reads as a product. `None` for an input to which no gradient flows, and
        empty where an input or an output isn't a scalar.
        """
        node = self._frame.node(self.number)
        avals = [self._frame.graph.avals[v] for v in (*node.operands, *node.outputs)]
        if len(node.outputs) != 1 or any(aval.shape for aval in avals):
            return ()
        operands = self._frame.operands(self.number)
        floats = [
            place
            for place, x in enumerate(operands)
            if jnp.issubdtype(x.dtype, jnp.floating)
            and node.operands[place] in self._frame.smooth
        ]
        slopes: list[float | None] = [None] * len(operands)
        if not floats or not self._frame.graph.inexact(node.outputs[0]):
            return tuple(slopes)

        def of_floats(moved: list[Any]) -> Any:
            inputs = list(operands)
            for place, value in zip(floats, moved, strict=True):
                inputs[place] = value
            return bind(node.eqn, inputs)[0]

        out, pull = jax.vjp(of_floats, [jnp.asarray(operands[p]) for p in floats])
        (found,) = pull(jnp.ones_like(out))
        for place, slope in zip(floats, found, strict=True):
            slopes[place] = float(slope)
        return tuple(slopes)

    def inside(self, index: int = 0) -> tuple[Step, ...]:
        """The steps inside of this one.

        Of a scan or a while loop those of iteration `index` (of a scan: the one of row
        `index`); of a `cond` those of the branch taken; of a custom rule what it does
        in the backward pass; of any other step what JAX's rule does there.

        Args:
          index: of a loop: the iteration.

        Raises:
          IndexError: the loop has no such iteration.
          ValueError: the step takes no part in the backward pass.
          RuntimeError: parts of the loss's arrays are on other processes' devices.
        """
        if self._frame.spans_processes:
            raise RuntimeError(
                f"Step {self.number}, `{self.operation}`: what is inside would be "
                "computed now, by all processes that have a part of the loss's arrays. "
                "Trace the loss in one process, on arrays that are its own: "
                "`multihost_utils.process_allgather(params, tiled=True)` of "
                "`jax.experimental` has them, and a few examples are enough."
            )
        node = self._frame.node(self.number)
        if opens(node) and not node.custom:
            return tuple(steps_of(forward_of(self._frame, self.number, index)))
        backward = backward_of(self._frame, self.number)
        if backward is None:
            raise ValueError(
                f"Step {self.number}, `{self.operation}`, has nothing inside: no "
                "gradient flows through it."
            )
        return tuple(steps_of(backward.frame))


def steps_of(frame: Frame) -> Iterator[Step]:
    """The steps of a frame, in order."""
    for number, node in enumerate(frame.graph.nodes):
        outputs = tuple(
            Output(
                tuple(frame.graph.avals[v].shape),
                str(frame.graph.avals[v].dtype),
                frame,
                v,
            )
            for v in node.outputs
        )
        backward = frame.outer is not None and frame.outer.kind == "backward"
        yield Step(
            **vars(line_of(frame, number)),
            inputs=tuple(map(frame.name_of, node.operands)),
            outputs=outputs,
            phase="backward" if backward else "forward",
            _frame=frame,
        )
