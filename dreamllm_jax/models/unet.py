"""The U-Net of Stable Diffusion 1.5, 2.1 and SDXL (arXiv 2112.10752, 2307.01952).

It predicts the noise (or the velocity, or the clean latents) in noisy latents at a time step, given a
sequence of context vectors. Its structure and parameter names are those of diffusers' `UNet2DConditionModel`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.config.towers import UNetConfig
from dreamllm_jax.models.unet_blocks import Downsample, ResnetBlock, SpatialTransformer, Upsample
from dreamllm_jax.ops.activations import silu
from dreamllm_jax.ops.conv import Conv
from dreamllm_jax.ops.linear import Dense
from dreamllm_jax.ops.norm import GroupNorm
from dreamllm_jax.ops.scan import remat

MAX_PERIOD = 10000.0


def sinusoids(
    values: Real[Array, "*rows"], width: int, cosines_first: bool, shift: int
) -> Float[Array, "*rows {width}"]:
    """Returns sines and cosines of `values` at `width // 2` frequencies, in float32 (arXiv 2006.11239).

    The frequencies decrease geometrically from 1 and would reach 1 / 10000 at index `width // 2 - shift`. An
    odd width is padded with a zero.
    """
    half = width // 2
    # Every operation is rounded to float32, as in diffusers: at t = 1000 the last bit makes a difference.
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    angles = values.astype(jnp.float32)[..., None] * np.exp(exponents / np.float32(half - shift))
    parts = [jnp.cos(angles), jnp.sin(angles)]
    parts = (parts if cosines_first else parts[::-1]) + [jnp.zeros((*values.shape, width % 2))]
    return jnp.concatenate(parts, axis=-1)


class TimeEmbedding(nn.Module):
    """A two-layer MLP applied to sinusoids."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B M"]) -> Float[Array, "B {self.width}"]:
        x = silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class Block(nn.Module):
    """Layers at one resolution: each is a resnet block and, if the block `attends`, a transformer.

    `level` is the index of the resolution, 0 being the finest.
    """

    config: UNetConfig
    level: int
    attends: bool
    resamples: bool = False
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    scan_layers: bool | None = None

    def resnet(
        self, i: int, x: Float[Array, "B h w c"], time: Float[Array, "B M"]
    ) -> Float[Array, "B h w c2"]:
        config = self.config
        width = config.block_out_channels[self.level]
        module = remat(ResnetBlock, self.remat)
        return module(width, config.norm_num_groups, config.norm_eps, dtype=self.dtype, name=f"resnets_{i}")(
            x, time
        )

    def transformer(
        self, i: int, x: Float[Array, "B h w c"], context: Float[Array, "B S X"]
    ) -> Float[Array, "B h w c"]:
        config = self.config
        return SpatialTransformer(
            depth=config.per_block("transformer_layers_per_block")[self.level],
            heads=config.per_block("num_heads")[self.level],
            groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            scan_layers=self.scan_layers,
            name=f"attentions_{i}",
        )(x, context)


class DownBlock(Block):
    """A block of the encoder. Returns its last state, and all of its states for the skip connections."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], time: Float[Array, "B M"], context: Float[Array, "B S X"]
    ) -> tuple[Float[Array, "B h2 w2 c2"], list[Array]]:
        states = []
        for i in range(self.config.layers_per_block):
            x = self.resnet(i, x, time)
            if self.attends:
                x = self.transformer(i, x, context)
            states.append(x)
        if self.resamples:
            x = Downsample((1, 1), dtype=self.dtype, name="downsamplers_0")(x)
            states.append(x)
        return x, states


class MidBlock(Block):
    """A resnet block, a transformer and a resnet block at the coarsest resolution."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], time: Float[Array, "B M"], context: Float[Array, "B S X"]
    ) -> Float[Array, "B h w c"]:
        x = self.resnet(0, x, time)
        x = self.transformer(0, x, context)
        return self.resnet(1, x, time)


class UpBlock(Block):
    """A block of the decoder: one layer more than in the encoder, each with a skip popped from `skips`."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w c"],
        time: Float[Array, "B M"],
        context: Float[Array, "B S X"],
        skips: list[Array],
    ) -> Float[Array, "B h2 w2 c2"]:
        for i in range(self.config.layers_per_block + 1):
            x = self.resnet(i, jnp.concatenate([x, skips.pop()], axis=-1), time)
            if self.attends:
                x = self.transformer(i, x, context)
        if self.resamples:
            # The encoder rounded odd heights and widths up, so crop to the size of the next skip.
            x = Upsample(dtype=self.dtype, name="upsamplers_0")(x, (skips[-1].shape[1], skips[-1].shape[2]))
        return x


class UNet(nn.Module):
    """The denoiser. `remat` (see `ops.scan.remat`) applies to every resnet and transformer block."""

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    scan_layers: bool | None = None

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        timesteps: Real[Array, "B"],
        context: Float[Array, "B S X"],
        added: dict[str, Array] | None = None,
    ) -> Float[Array, "B h w c2"]:
        """Returns the prediction for each row's latents at its time step (0 to T - 1, may be fractional).

        Latents may have any height and width. SDXL also takes `added`: `text_embeds` [B, pooled_text_dim] and
        `time_ids` [B, 6], which are original height and width, crop top and left, target height and width,
        all in pixels.

        Raises:
          ValueError: the width of latents or context is not the config's; `added` is missing or incomplete,
            or is given to a model without added conditions.
        """
        config, coarsest = self.config, len(self.config.block_out_channels) - 1
        self._check(latents, context, added)
        time = self._time(timesteps, added)
        options = {
            "dtype": self.dtype,
            "remat": self.remat,
            "attention": self.attention,
            "scan_layers": self.scan_layers,
        }
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(latents)
        skips = [x]
        for i, kind in enumerate(config.down_block_types):
            block = DownBlock(
                config, i, "CrossAttn" in kind, i < coarsest, name=f"down_blocks_{i}", **options
            )
            x, states = block(x, time, context)
            skips += states
        if config.mid_block_type is not None:
            x = MidBlock(config, coarsest, True, name="mid_block", **options)(x, time, context)
        for i, kind in enumerate(config.up_block_types):
            level = coarsest - i
            block = UpBlock(config, level, "CrossAttn" in kind, level > 0, name=f"up_blocks_{i}", **options)
            x = block(x, time, context, skips)
        norm = GroupNorm(config.norm_num_groups, config.norm_eps, self.dtype, silu=True, name="conv_norm_out")
        return Conv(config.out_channels, dtype=self.dtype, name="conv_out")(norm(x))

    def _time(self, timesteps: Real[Array, "B"], added: dict[str, Array] | None) -> Float[Array, "B M"]:
        """Returns the embedding of the time step, for SDXL plus that of the pooled text and the sizes."""
        config, width = self.config, 4 * self.config.block_out_channels[0]
        wave = (config.flip_sin_to_cos, config.freq_shift)
        time = sinusoids(timesteps, config.block_out_channels[0], *wave)
        time = TimeEmbedding(width, self.dtype, name="time_embedding")(time)
        if added is None:
            return time
        assert config.addition_time_embed_dim is not None
        sizes = sinusoids(added["time_ids"], config.addition_time_embed_dim, *wave).reshape(len(time), -1)
        conditions = jnp.concatenate([added["text_embeds"].astype(jnp.float32), sizes], axis=-1)
        return time + TimeEmbedding(width, self.dtype, name="add_embedding")(conditions)

    def _check(self, latents: Array, context: Array, added: dict[str, Array] | None) -> None:
        config = self.config
        if latents.shape[-1] != config.in_channels:
            raise ValueError(
                f"U-Net: latents are {latents.shape}; the last axis must be in_channels={config.in_channels} "
                "(channels last)."
            )
        if context.shape[-1] != config.cross_attention_dim:
            raise ValueError(
                f"U-Net: the context is {context.shape}; its width must be "
                f"cross_attention_dim={config.cross_attention_dim}."
            )
        if config.pooled_text_dim is None:
            if added is not None:
                raise ValueError("U-Net: this model has no added conditions; pass added=None.")
            return
        needed = {
            "text_embeds": (len(latents), config.pooled_text_dim),
            "time_ids": (len(latents), 6),
        }
        given = {name: value.shape for name, value in (added or {}).items()}
        if given != needed:
            raise ValueError(f"U-Net: added conditions are {given}; this model (SDXL) needs {needed}.")
