"""Linear maps: the product `x @ kernel` for every platform, and Flax's `Dense` built on it."""

from __future__ import annotations

import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.ops import cpu


def linear(
    x: Float[Array, "*rows c"], kernel: Float[Array, "c c2"], preferred_element_type: Any = None
) -> Float[Array, "*rows c2"]:
    """Returns `x @ kernel`, with the dtype of x unless `preferred_element_type` is given."""
    same_type = preferred_element_type in (None, x.dtype) and x.dtype == kernel.dtype
    if same_type and cpu.is_target():
        return cpu.linear(x, kernel)
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=preferred_element_type)


def _dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """Calls `linear` with the signature of `lax.dot_general`, for the contraction that `nn.Dense` makes."""
    assert dimensions == (((x.ndim - 1,), (0,)), ((), ())) and precision is None
    return linear(x, kernel)


@typing.no_type_check  # beartype cannot check Flax's annotation of `promote_dtype`
class Dense(nn.Dense):
    """`flax.linen.Dense` on `linear`: `x @ kernel + bias` over the last axis, computed in float32 by default.

    `kernel` is [in, out]. Parameters are float32, whatever `dtype` is.
    """

    dtype: Any = jnp.float32
    dot_general: Any = _dot_general
