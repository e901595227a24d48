"""Linear maps: the product `x @ kernel` for every platform, and Flax's `Dense` built on it."""

from __future__ import annotations

import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dreamllm_jax.ops import cpu


def linear(
    x: Float[Array, "*rows c"], kernel: Float[Array, "c ..."], preferred_element_type: Any = None
) -> Float[Array, "..."]:
    """Returns `x @ kernel`, with the dtype of x unless `preferred_element_type` is given.

    A kernel of several feature axes gives as many: [B, L, D] and [D, 2, F] give [B, L, 2, F].
    """
    same_type = preferred_element_type in (None, x.dtype) and x.dtype == kernel.dtype
    if same_type and cpu.is_target():
        out = cpu.linear(x, kernel.reshape(len(kernel), -1))
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])
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


class DenseGeneral(nn.Module):
    """`Dense` with any number of feature axes, whose kernel may be int8.

    `kernel` is [in, *features]. If it is int8, `kernel_scale` [*features] is beside it, and the result is
    that of `kernel * kernel_scale` (see `generate.int8`).
    """

    features: int | tuple[int, ...]
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], *features))
        scale = self.get_variable("params", "kernel_scale")
        out = scaled_linear(x.astype(self.dtype), kernel, scale).astype(self.dtype)
        if not self.use_bias:
            return out
        return out + self.param("bias", nn.initializers.zeros, features).astype(self.dtype)


def scaled_linear(
    x: Float[Array, "*rows c"],
    kernel: Shaped[Array, "c ..."],
    scale: Float[Array, "..."] | None,
    preferred_element_type: Any = None,
) -> Float[Array, "..."]:
    """Returns `x @ (kernel * scale)`, in float32 if there is a scale.

    The kernel is converted to x's dtype, and so is the product before it is scaled: XLA would otherwise
    convert int8 to float32, whose products are slower.
    """
    out = linear(x, kernel.astype(x.dtype), preferred_element_type)
    return out if scale is None else out.astype(jnp.float32) * scale
