"""What a run of training gives: its result, the state to go on from, its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgrad.pytrees import PyTree, leaf_name
from jaxgrad.tables import Report, Table, number


class TrainState(NamedTuple):
    """All that a run needs to go on: a pytree of arrays, to be saved as any other.

    Attributes:
      step: how many updates were made since the first run began. With `batch_size` it
        is also the place in the data: the next batch follows from it and the keys.
        With `batches` it is how many of them were used.
      params: the trained leaves, with `None` for those that are static or fixed.
      optimizer: the state of `sgd_update`, or of the optax transformation.
      batching: how rows are cut into batches: `rows`, `batch_size`, `drop_last`, and
        the data of the keys `shuffle_key` and `step_key`, as far as they are in use.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    batching: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class TrainResult(Report):
    """What a run of `train` did.

    Attributes:
      params: the parameters after the last update, static leaves included.
      losses: `losses[k]` is the loss before update `k * record_every`, of that step's
        batch. A run that stopped early has looked at the loss of the `params` it
        returns: where that step is one of those recorded, it is one more entry, the
        last.
      gradient_norms: the 2-norm of the whole gradient, at the same steps.
      steps: how many updates this run made.
      stopped: `None` if all steps were made; else why not: a sentence that begins with
        `tolerance`, `non-finite loss`, `non-finite gradient`, `non-finite parameter`,
        `interrupted` or `batches` (in a `BatchError`).
      state: give it to `train` to go on.
    """

    params: PyTree
    losses: Float[np.ndarray, " records"]
    gradient_norms: Float[np.ndarray, " records"]
    steps: int
    stopped: str | None
    state: TrainState

    def tables(self) -> list[Table]:
        """Steps, losses and gradient norms, first and last."""
        rows = [["updates made", str(self.steps)]]
        if self.losses.size:
            rows += [
                ["first loss", number(self.losses[0])],
                ["last recorded loss", number(self.losses[-1])],
                ["first gradient norm", number(self.gradient_norms[0])],
                ["last recorded gradient norm", number(self.gradient_norms[-1])],
            ]
        rows.append(["stopped", self.stopped or "no: all steps were made"])
        return [Table("Training", ["", ">value"], rows)]


class BatchError(ValueError):
    """The `batches` of a run ended early, failed, or changed; the message says where.

    Attributes:
      result: the `TrainResult` of the run until then: nothing is lost.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.mean((x - w) ** 2)
      >>> batches = [(jnp.array([1.0, 2.0]),), (jnp.array([3.0, 4.0]),)]
      >>> try:
      ...     jaxgrad.train(loss, 0.0, batches=batches, steps=5, learning_rate=0.1)
      ... except jaxgrad.BatchError as error:
      ...     print(error.result.steps)
      2
    """

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


def check_state(fresh: TrainState, state: Any) -> None:
    """Says in what a state differs from what these arguments begin with.

    Raises:
      ValueError: a leaf is absent or has another shape or dtype, or the batches are
        cut or shuffled otherwise.
    """
    if not isinstance(state, TrainState):
        hint = " Give its `state`." if isinstance(state, TrainResult) else ""
        raise TypeError(
            f"state must be a TrainState, as `result.state` is, and is a "
            f"{type(state).__name__}.{hint} (Restored from a file, it takes the "
            "structure of what is given for it: `train(..., steps=0).state`.)"
        )
    if fresh.batching.keys() != state.batching.keys():
        now, before = (", ".join(sorted(s.batching)) or "none" for s in (fresh, state))
        raise ValueError(
            f"`state` is of a run with other options of batches: {before}; this one "
            f"has {now}. Give the same, or begin anew from `params=result.params`."
        )
    for tree in ("params", "optimizer"):
        want, have = (
            _leaves(f"state.{tree}", getattr(s, tree)) for s in (fresh, state)
        )
        for leaf in [*want, *have]:
            if want.get(leaf) != have.get(leaf):
                raise ValueError(
                    "`state` isn't of these params and this optimizer: leaf "
                    f"`{leaf}` should be {want.get(leaf, 'absent')}, and is "
                    f"{have.get(leaf, 'absent')}. Give the same arguments as in the "
                    "run that returned it."
                )
    for name, value in fresh.batching.items():
        now, before = (np.asarray(x).tolist() for x in (value, state.batching[name]))
        if now != before:
            raise ValueError(
                f"`state` is of a run with {name} {before}, and this one has {now}. "
                "Give the same, or begin anew from `params=result.params`."
            )


def _leaves(root: str, tree: PyTree) -> dict[str, str]:
    """Every leaf's dtype and shape in words, by its name."""
    return {
        leaf_name(path, root): f"{np.result_type(leaf)} of shape {np.shape(leaf)}"
        if not isinstance(leaf, jax.Array)
        else f"{leaf.dtype} of shape {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
