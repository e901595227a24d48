"""2-D convolution, channels last, fast on every backend and inside loops.

XLA's CPU backend runs a convolution fast only in the layout of its forward pass (rows, height,
width, channels), and brings others into it only outside of loops. The gradients that autodiff
derives are in other layouts, so that inside `lax.scan` (gradient accumulation) they cost 50 times
as much. On CPU the gradients are therefore written here in the forward's own layout; the numbers
are the same to the last bit. `benchmarks/conv.py` measures it, and the matrix-product forms that
were found slower.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.sharding import constrain, platform

LAYOUT = ("NHWC", "HWIO", "NHWC")
AXES = ("pictures", "height", "width", "channels")


class Conv(nn.Module):
    """`size` x `size` convolution with bias; kernel [size, size, in, out], computed in `dtype`.

    `padding` is (before, after) along both sides; by default the one that keeps the size at stride 1.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        padding = (self.size // 2,) * 2 if self.padding is None else self.padding
        # Pinned on both sides: left free, XLA may split the channels between two convolutions, and on
        # images smaller than the kernel its partitioner then computes wrong gradients (JAX 0.10).
        x = constrain(x.astype(self.dtype), *AXES)
        return constrain(convolve(x, kernel, self.stride, padding) + bias, *AXES)


def convolve(
    x: Float[Array, "B h w c"], kernel: Float[Array, "k l c c2"], stride: int, padding: tuple[int, int]
) -> Float[Array, "B h2 w2 c2"]:
    """Cross-correlation (what deep learning calls convolution), in the form that suits the backend."""
    form = canonical if platform() == "cpu" else plain
    return form(x, kernel, stride, padding)


def plain(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """XLA's convolution, with the gradients that autodiff derives."""
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, (padding,) * 2, dimension_numbers=LAYOUT)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def canonical(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """The same, with gradients in the forward's layout; reverse-mode differentiation only."""
    return plain(x, kernel, stride, padding)


def _forward(
    x: Array, kernel: Array, stride: int, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return plain(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: tuple[int, int], saved: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    """The gradient of x convolves `d_out` with the turned kernel; the kernel's, x with `d_out`.

    Both are padded so that they have the size of what they are the gradient of.
    """
    x, kernel = saved
    before = padding[0]
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=LAYOUT)
    sides = list(zip(x.shape[1:3], kernel.shape[:2], d_out.shape[1:3], strict=True))
    after = [size - 1 + before - (outputs - 1) * stride for size, _, outputs in sides]
    d_x = conv(
        d_out,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        padding=[(k - 1 - before, a) for (_, k, _), a in zip(sides, after, strict=True)],
        lhs_dilation=(stride,) * 2,
    )
    d_kernel = conv(
        x.transpose(3, 1, 2, 0),
        d_out.transpose(1, 2, 0, 3),
        padding=[(before, k - 1 - a) for (_, k, _), a in zip(sides, after, strict=True)],
        rhs_dilation=(stride,) * 2,
    )
    return d_x, d_kernel.transpose(1, 2, 0, 3)


canonical.defvjp(_forward, _backward)
