"""The lesson's model: one linear layer, as a pure function of its parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, PRNGKeyArray, Real


class LinearParams(NamedTuple):
    """The parameters of a linear layer, laid out as `torch.nn.Linear` has them.

    Attributes:
      weight: shape `(out_features, in_features)`.
      bias: shape `(out_features,)`.
    """

    weight: Float[ArrayLike, "out in"]
    bias: Float[ArrayLike, " out"]


def init_linear(
    key: PRNGKeyArray | Key[Array, ""],
    in_features: int,
    out_features: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> LinearParams:
    r"""Draws the parameters of a linear layer as `torch.nn.Linear` does by default.

    Weight and bias are both drawn from $U(-k, k)$ with
    $k = 1/\sqrt{\mathrm{in\_features}}$. (The numbers themselves differ from
    PyTorch's: the generators do.)

    Args:
      key: a key made by `jax.random.key` (or `jax.random.PRNGKey`).
      in_features: how many inputs the layer has, at least 1.
      out_features: how many outputs the layer has, at least 1.
      dtype: a floating dtype.

    Returns:
      `LinearParams` with a weight of shape `(out_features, in_features)`.

    Raises:
      ValueError: fewer than one feature.
      TypeError: a dtype that isn't floating.

    Example:
      >>> import jax, jaxgrad
      >>> params = jaxgrad.init_linear(jax.random.key(0), 3, 1)
      >>> params.weight.shape, params.bias.shape
      ((1, 3), (1,))

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html,
    "Variables"; the bound is He et al. 2015 (https://arxiv.org/abs/1502.01852) with
    $a = \sqrt{5}$.
    """
    for name, features in (
        ("in_features", in_features),
        ("out_features", out_features),
    ):
        if features < 1:
            raise ValueError(f"{name} must be at least 1, and is {features}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, and is {jnp.dtype(dtype)}.")
    bound = 1 / math.sqrt(in_features)
    weight_key, bias_key = jax.random.split(key)
    return LinearParams(
        weight=jax.random.uniform(
            weight_key, (out_features, in_features), dtype, -bound, bound
        ),
        bias=jax.random.uniform(bias_key, (out_features,), dtype, -bound, bound),
    )


def linear(
    params: LinearParams, x: Real[ArrayLike, "*input"]
) -> Float[Array, "*batch out"]:
    r"""A linear layer: $\hat y = x W^\top + b$.

    Args:
      params: a weight of shape `(out, in)` and a bias of shape `(out,)`.
      x: inputs of shape `(*batch, in)`, with any number of batch dimensions.

    Returns:
      Predictions of shape `(*batch, out)`.

    Raises:
      ValueError: weight, bias and `x` don't fit each other.

    Example:
      >>> import jaxgrad, jax.numpy as jnp
      >>> params = jaxgrad.LinearParams(jnp.array([[0.5, 0.4, 0.3]]), jnp.array([0.3]))
      >>> print(jaxgrad.linear(params, jnp.array([[1.0, 2.0, 3.0]])))
      [[2.5]]

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """
    weight, bias, x = (jnp.asarray(leaf) for leaf in (*params, x))
    if weight.ndim != 2:
        raise ValueError(
            f"weight has shape {weight.shape}; (out_features, in_features) was "
            "expected, as in torch.nn.Linear."
        )
    out_features, in_features = weight.shape
    if bias.shape != (out_features,):
        raise ValueError(
            f"bias has shape {bias.shape}, and weight {weight.shape}: a bias of shape "
            f"({out_features},) was expected, one number per row of weight."
        )
    if x.ndim == 0 or x.shape[-1] != in_features:
        hint = (
            " weight looks transposed: its layout is (out, in)."
            if x.ndim and x.shape[-1] == out_features
            else ""
        )
        raise ValueError(
            f"x has shape {x.shape}, and weight {weight.shape}: the last dimension of "
            f"x should be weight's in_features, {in_features}.{hint}"
        )
    return x @ weight.T + bias
