"""Normalization with statistics in float32: over the last axis, or over groups of channels."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.ops.activations import silu


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` over the last axis (arXiv 1607.06450), with the two-pass variance."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    use_fast_variance: bool = False


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm`: `scale * x / sqrt(mean(x^2) + epsilon)` over the last axis (arXiv 1910.07467)."""

    dtype: Any = jnp.float32


class GroupNorm(nn.Module):
    """Normalizes groups of neighbouring channels over all pixels (arXiv 1803.08494).

    With `silu`, that activation follows as part of the same operation: the normalized values between the two
    are never written to memory.

    Raises:
      ValueError: the groups do not divide the channels.
    """

    groups: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *pixels c"]) -> Float[Array, "B *pixels c"]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"norm_num_groups={self.groups} does not divide {channels} channels; choose widths "
                "(block_out_channels) that are multiples of it."
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        out = cast(Array, group_norm(x, scale, bias, self.groups, self.epsilon, self.silu))
        return out.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
    x: Float[Array, "B *pixels c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    groups: int,
    epsilon: float,
    with_silu: bool,
) -> Float[Array, "B *pixels c"]:
    """Returns group normalization, with SiLU if asked, in float32. Differentiable in reverse mode only.

    The backward pass keeps x in its own dtype, not in float32, with the means and the inverse standard
    deviations. Its closed form reads x and the gradient twice: half the memory traffic of the
    gradient that autodiff derives.
    """
    return _group_norm_forward(x, scale, bias, groups, epsilon, with_silu)[0]


def _group_norm_forward(
    x: Array, scale: Array, bias: Array, groups: int, epsilon: float, with_silu: bool
) -> tuple[Array, tuple[Array, ...]]:
    centered = x.astype(jnp.float32)
    mean = _group_means(centered, groups)
    centered -= mean
    inverse = jax.lax.rsqrt(_group_means(centered * centered, groups) + epsilon)
    out = centered * (inverse * scale) + bias
    return silu(out) if with_silu else out, (x, mean, inverse, scale, bias)


def _group_norm_backward(
    groups: int, epsilon: float, with_silu: bool, saved: tuple[Array, ...], d_out: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, bias = saved
    all_but_channels = tuple(range(x.ndim - 1))
    normal = (x.astype(jnp.float32) - mean) * inverse
    if with_silu:
        (d_out,) = jax.vjp(silu, normal * scale + bias)[1](d_out)
    d_normal = d_out * scale
    projection = _group_means(d_normal * normal, groups)
    d_x = inverse * (d_normal - _group_means(d_normal, groups) - normal * projection)
    return d_x.astype(x.dtype), (d_out * normal).sum(all_but_channels), d_out.sum(all_but_channels)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _group_means(x: Float[Array, "B *pixels c"], groups: int) -> Float[Array, "B *ones c"]:
    """Returns the mean of each channel's group.

    The mean over pixels comes first, then that over the channels of a group. It is the form for all backends:
    on CPUs it takes a third of the time of one mean over both.
    """
    means = x.mean(range(1, x.ndim - 1)).reshape(len(x), groups, -1).mean(-1)
    means = jnp.repeat(means, x.shape[-1] // groups, axis=1)
    return means.reshape(len(x), *(1,) * (x.ndim - 2), -1)
