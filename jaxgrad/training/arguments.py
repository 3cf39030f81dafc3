"""What `train` can't take, said before anything is computed."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.pytrees import Loss, function_name
from jaxgrad.sgd import check_number

_BY_PLACE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def whole(name: str, value: Any) -> int:
    """A number that must be an integer, as one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, and is {value!r}.") from None


def check_arguments(
    steps: int | None, learning_rate: Any, optimizer: Any, record_every: int
) -> None:
    """Refuses numbers out of range, and none or two ways to update."""
    if (learning_rate is None) == (optimizer is None):
        given = "neither" if optimizer is None else "both"
        raise TypeError(
            f"train needs a learning_rate (for sgd_update) or an optimizer (of optax), "
            f"one of the two, and was given {given}."
        )
    if optimizer is not None and not (
        callable(getattr(optimizer, "init", None))
        and callable(getattr(optimizer, "update", None))
    ):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3), and is a {type(optimizer).__name__}."
        )
    if learning_rate is not None and not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    if steps is not None and steps < 0:
        raise ValueError(f"steps must be 0 or more, and is {steps}.")
    if record_every < 1:
        raise ValueError(f"record_every must be 1 or more, and is {record_every}.")


def check_batching(
    steps: int | None,
    batch_size: int | None,
    shuffle_key: Any,
    drop_last: bool,
    batches: Any,
    reduction: str | None,
) -> None:
    """Refuses options of batches that don't go together."""
    if batches is None and steps is None:
        raise TypeError(
            "train needs steps, the number of updates to make. (It may be None only "
            "with batches=, and then the run is over when they end.)"
        )
    if batches is not None and batch_size is not None:
        raise TypeError(
            "batch_size cuts the arrays in *args, and batches= come cut already: give "
            "one of the two."
        )
    if shuffle_key is not None and batch_size is None:
        raise TypeError(
            "shuffle_key shuffles the rows of *args, and needs batch_size; batches= "
            "are taken in the order in which they come."
        )
    if drop_last and batch_size is None and batches is None:
        raise TypeError("drop_last needs batch_size or batches.")
    if reduction not in (None, "mean"):
        raise ValueError(
            f'reduction must be "mean" or None, and is {reduction!r}: a loss that is '
            "no mean over rows can't be computed in weighted parts."
        )


def check_keys(loss: Loss, count: int, shuffle_key: Any, step_key: Any) -> None:
    """Refuses what is no key, and a loss that can't be given one.

    `count` is how many arguments the loss has by position, after params.
    """
    for name, key in (("shuffle_key", shuffle_key), ("step_key", step_key)):
        if key is None:
            continue
        dtype = getattr(key, "dtype", None)
        typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        raw = dtype == np.uint32 and key.ndim == 1
        if not (raw or (typed and key.shape == ())):
            raise TypeError(
                f"{name} must be one random key, such as jax.random.key(0), and is "
                f"{'an array of shape ' + str(key.shape) if dtype else repr(key)}."
            )
    if step_key is not None:
        try:
            parameters = inspect.signature(loss).parameters
        except (TypeError, ValueError):
            return
        places = [name for name, p in parameters.items() if p.kind in _BY_PLACE]
        by_place = "key" in places and places.index("key") <= count
        known = "key" in parameters or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
        if not known or by_place:
            how = (
                "takes its argument `key` by position; put it behind the others: "
                "`(params, *args, key)`"
                if by_place
                else "has no argument `key`"
            )
            raise TypeError(
                "step_key is folded with the step and given to the loss as `key=`, and "
                f"{function_name(loss)} {how}."
            )
