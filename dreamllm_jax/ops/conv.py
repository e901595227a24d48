"""2-D convolution, channels last: the function for every platform, and the Flax module built on it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.ops import cpu
from dreamllm_jax.sharding import constrain

AXES = ("pictures", "height", "width", "channels")


class Conv(nn.Module):
    """`size` x `size` convolution; kernel [size, size, in, out], computed in `dtype`.

    `padding` is (before, after) for height and width alike. The default keeps the size at stride 1.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", self.kernel_init, shape), self.dtype)
        padding = (self.size // 2, self.size // 2) if self.padding is None else self.padding
        # Constrained on both sides. Otherwise XLA may split the channels between two convolutions, and for
        # images smaller than the kernel its partitioner then computes wrong gradients (JAX 0.10).
        x = constrain(x.astype(self.dtype), *AXES)
        x = convolve(x, kernel, self.stride, padding)
        if self.use_bias:
            x = x + jnp.asarray(self.param("bias", nn.initializers.zeros, (self.features,)), self.dtype)
        return constrain(x, *AXES)


def convolve(
    x: Float[Array, "B h w c"], kernel: Float[Array, "k l c c2"], stride: int, padding: tuple[int, int]
) -> Float[Array, "B h2 w2 c2"]:
    """Returns the cross-correlation of x with `kernel`, which deep learning calls convolution.

    `padding` is (before, after) for height and width alike.
    """
    form = cpu.convolution if cpu.is_target() else xla_convolution
    return form(x, kernel, stride, padding)


def xla_convolution(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Returns XLA's convolution, with the gradients that autodiff derives."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, (padding,) * 2, dimension_numbers=layout)
