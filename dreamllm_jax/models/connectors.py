"""The small trained parts between the towers: dream queries and projectors (DreamLLM, arXiv 2309.11499)."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.config.towers import ProjectorConfig
from dreamllm_jax.models.layers import Dense, gelu

Initializer = nn.initializers.Initializer

# The channels of the sam projector's two convolutions, as the reference fixes them.
SAM_CHANNELS = (512, 1024)


class DreamQueries(nn.Module):
    """The learned vectors that ask the language model for an image: `dream_queries` [Q, D]."""

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

    Its parts are `linear_0, linear_1, ...` and `conv_0, conv_1` in the order of their use. `kernel_init`
    decides how large its outputs begin: beside the language model's small embeddings, those of unit
    variance would drown what its layers add to them.
    """

    config: ProjectorConfig
    features: int
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*rows P width_in"]) -> Float[Array, "*rows P_out width_out"]:
        """Raises ValueError where conv and sam are given patches that form no square."""
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
        """3x3 convolutions without activation over the square patch grid, padded by one."""
        *rows, patches, width = x.shape
        outputs = self.config.num_outputs(patches)
        side = round(patches**0.5)
        x = x.reshape(-1, side, side, width)
        conv = partial(
            nn.Conv,
            kernel_size=(3, 3),
            strides=stride,
            padding=1,
            use_bias=self.config.bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
        )
        for i, features in enumerate(channels):
            x = conv(features, name=f"conv_{i}")(x)
        return x.reshape(*rows, outputs, x.shape[-1])


class GlobalProjector(nn.Module):
    """SDXL's pooled text embedding: a linear map of the mean over the Q query states."""

    features: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "*rows Q D"]) -> Float[Array, "*rows width_out"]:
        mean = states.mean(-2, dtype=jnp.float32).astype(self.dtype)
        return Dense(self.features, self.bias, dtype=self.dtype, name="linear_0")(mean)
