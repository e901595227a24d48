"""Activation functions, by the names that published configs give them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[..., jax.Array]


def _in_float32(function: Callable[[jax.Array], jax.Array]) -> Activation:
    """Returns the activation computed in float32 and rounded once; the backward pass keeps only its input.

    `prevent_cse` is that of `jax.checkpoint`. Without it, XLA may keep what the forward pass computed, unless
    the caller is rematerialized itself or the body of a loop; its barrier splits the kernels of the backward
    pass.
    """

    @functools.wraps(function)
    def activation(x: Float[Array, "..."], prevent_cse: bool = True) -> Float[Array, "..."]:
        if x.dtype == jnp.float32:
            return function(x)
        rounded = jax.checkpoint(
            lambda y: function(y.astype(jnp.float32)).astype(y.dtype), prevent_cse=prevent_cse
        )
        return rounded(x)

    return activation


@_in_float32
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x * sigmoid(x)` (arXiv 1702.03118)."""
    return x * jax.nn.sigmoid(x)


@_in_float32
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


@_in_float32
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the exact GELU, computed with the error function (arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}
