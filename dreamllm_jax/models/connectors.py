"""The trained modules between the towers: dream queries and projectors (DreamLLM, arXiv 2309.11499)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.config.towers import ProjectorConfig
from dreamllm_jax.ops.activations import gelu
from dreamllm_jax.ops.conv import Conv
from dreamllm_jax.ops.linear import Dense

Initializer = nn.initializers.Initializer

# The channels of the two convolutions of the "sam" projector, which the reference hard-codes.
SAM_CHANNELS = (512, 1024)


class DreamQueries(nn.Module):
    """The learned embeddings that ask the language model for an image: `dream_queries` [Q, D]."""

    num_queries: int
    width: int
    std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "Q D"]:
        init = nn.initializers.normal(self.std)
        return self.param("dream_queries", init, (self.num_queries, self.width)).astype(self.dtype)


class Projector(nn.Module):
    """Maps P vectors to `config.num_outputs(P)` vectors of width `features`.

    Its layers are `linear_0, linear_1, ...` and `conv_0, conv_1`, in the order of their use. `kernel_init`
    sets the initial scale of the outputs. Next to the small embeddings of a language model, outputs of unit
    variance would dominate what its layers add to the residual stream.
    """

    config: ProjectorConfig
    features: int
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*rows P width_in"]) -> Float[Array, "*rows P_out width_out"]:
        """Returns the projected vectors.

        Raises:
          ValueError: the kind is "conv" or "sam" and P is not a square number.
        """
        kind = self.config.kind
        if kind == "conv":
            return self._convolve(x, (self.features,), stride=1)
        if kind == "sam":
            return self._linear(self._convolve(x, SAM_CHANNELS, stride=2), 0)
        x = self._linear(x, 0)
        for i in range(1, self.config.depth):
            x = self._linear(gelu(x), i)
        return x

    def _linear(self, x: Float[Array, "*rows width_in"], i: int) -> Float[Array, "*rows width_out"]:
        dense = Dense(
            self.features,
            self.config.bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name=f"linear_{i}",
        )
        return dense(x)

    def _convolve(
        self, x: Float[Array, "*rows P width_in"], channels: tuple[int, ...], stride: int
    ) -> Float[Array, "*rows P_out width_out"]:
        """Applies 3x3 convolutions over the square grid of patches, padded by 1, without activations."""
        *rows, patches, width = x.shape
        outputs = self.config.num_outputs(patches)
        side = round(patches**0.5)
        x = x.reshape(-1, side, side, width)
        for i, features in enumerate(channels):
            conv = Conv(
                features,
                stride=stride,
                use_bias=self.config.bias,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=f"conv_{i}",
            )
            x = conv(x)
        return x.reshape(*rows, outputs, x.shape[-1])


class GlobalProjector(nn.Module):
    """The substitute for SDXL's pooled text embedding: a linear map of the mean over the Q query states."""

    features: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*rows Q D"]) -> Float[Array, "*rows width_out"]:
        mean = states.mean(-2, dtype=jnp.float32).astype(self.dtype)
        return Dense(self.features, self.bias, dtype=self.dtype, name="linear_0")(mean)
