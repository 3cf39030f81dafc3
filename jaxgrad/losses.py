"""Losses of a prediction and a target, with a strict rule: the shapes are the same."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from jaxgrad.model import LinearParams, linear


def squared_error(
    prediction: Real[ArrayLike, "*prediction"], target: Real[ArrayLike, "*target"]
) -> Float[Array, "*prediction"]:
    r"""The squared error of each entry: $(\hat y_i - y_i)^2$.

    Args:
      prediction: $\hat y$, of any shape.
      target: $y$, of exactly that shape. Nothing is broadcast: `(n, 1)` against `(n,)`
        would give an `(n, n)` table of differences, and a loss of the wrong thing.

    Returns:
      The squared errors, of the same shape.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> print(jaxgrad.squared_error(jnp.array([2.5, 1.0]), jnp.array([5.0, 1.0])))
      [6.25 0.  ]
    """
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(_shapes_differ(prediction.shape, target.shape))
    if not jnp.issubdtype(jnp.result_type(prediction, target), jnp.inexact):
        prediction = prediction.astype(float)  # integers would wrap around
    return jnp.square(prediction - target)


def mean_squared_error(
    prediction: Real[ArrayLike, "*prediction"], target: Real[ArrayLike, "*target"]
) -> Float[Array, ""]:
    r"""The mean squared error: $\frac{1}{n} \sum_{i=1}^{n} (\hat y_i - y_i)^2$.

    The mean is over all $n$ entries, as in `torch.nn.functional.mse_loss`.

    Args:
      prediction: $\hat y$, of any shape with at least one entry.
      target: $y$, of exactly that shape.

    Returns:
      A scalar.

    Raises:
      ValueError: the shapes differ, or are empty.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> prediction, target = jnp.array([2.5, 1.0]), jnp.array([5.0, 1.0])
      >>> print(jaxgrad.mean_squared_error(prediction, target))
      3.125

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html
    """
    errors = squared_error(prediction, target)
    if errors.size == 0:
        raise ValueError(
            f"prediction and target are empty, of shape {errors.shape}: the mean of no "
            "entries is not a number. Leave empty batches out."
        )
    return jnp.mean(errors)


def linear_loss(
    params: LinearParams,
    x: Real[ArrayLike, "*input"],
    y: Real[ArrayLike, "*target"],
) -> Float[Array, ""]:
    r"""The lesson's loss: the mean squared error of a linear layer.

    $L(W, b) = \frac{1}{n} \sum_i (x_i W^\top + b - y_i)^2$

    Args:
      params: a weight of shape `(out, in)` and a bias of shape `(out,)`.
      x: inputs of shape `(*batch, in)`.
      y: targets of shape `(*batch, out)`.

    Returns:
      A scalar.

    Raises:
      ValueError: the shapes don't fit, or the batch is empty.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
      >>> x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
      >>> print(jaxgrad.linear_loss(params, x, y))
      6.25
    """
    return mean_squared_error(linear(params, x), y)


def _shapes_differ(prediction: tuple[int, ...], target: tuple[int, ...]) -> str:
    if target == prediction[:-1] and prediction[-1] == 1:
        fix = "give the target a last dimension, `target[..., None]`"
    elif prediction == target[:-1] and target[-1] == 1:
        fix = "drop the target's last dimension, `target[..., 0]`"
    else:
        fix = "give both the same shape"
    return (
        f"prediction has shape {prediction} and target has shape {target}. They must "
        f"be equal, since nothing is broadcast here: {fix}."
    )
