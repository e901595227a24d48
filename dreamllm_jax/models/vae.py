"""The variational autoencoder between pixels and latents (arXiv 1312.6114, 2112.10752).

Its structure and parameter names are those of diffusers' `AutoencoderKL`.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dreamllm_jax.config.model import AttentionKernel as AttentionName
from dreamllm_jax.config.towers import VaeConfig
from dreamllm_jax.models.unet_blocks import Attention, Downsample, ResnetBlock, Upsample
from dreamllm_jax.ops.conv import Conv
from dreamllm_jax.ops.norm import GroupNorm

EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def diffusion_pixels(images: UInt8[Array, "*rows h w c"]) -> Float[Array, "*rows h w c"]:
    """Returns uint8 images as float32 pixels in [-1, 1], computed on the device."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(pixels: Float[Array, "*rows h w c"]) -> UInt8[Array, "*rows h w c"]:
    """Returns pixels in [-1, 1] as rounded uint8; values outside the range are clipped."""
    return jnp.round(jnp.clip(pixels.astype(jnp.float32) * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def sample_latents(
    moments: Float[Array, "*rows h w c_2"], noise: Float[Array, "*rows h w c"], scaling_factor: float
) -> Float[Array, "*rows h w c"]:
    """Returns scaled latents sampled from the posterior: `(mean + std * noise) * scaling_factor`.

    `moments` are mean and log-variance, concatenated along channels as `Vae.encode` returns them.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return (mean + jnp.exp(0.5 * log_variance) * noise) * scaling_factor


class VaeBlock(nn.Module):
    """Resnet blocks at one resolution, then the change to the next."""

    config: VaeConfig
    width: int
    layers: int
    resample: Literal["down", "up"] | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        for i in range(self.layers):
            x = _resnet(self.config, self.width, self.dtype, f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample((0, 1), dtype=self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(dtype=self.dtype, name="upsamplers_0")(x)
        return x


class VaeMidBlock(nn.Module):
    """A resnet block, single-head self-attention over the pixels, a resnet block."""

    config: VaeConfig
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        config, width = self.config, x.shape[-1]
        x = _resnet(config, width, self.dtype, "resnets_0")(x)
        attend = Attention(1, True, config.norm_num_groups, self.dtype, self.attention, name="attentions_0")
        x = x + attend(x.reshape(len(x), -1, width)).reshape(x.shape)
        return _resnet(config, width, self.dtype, "resnets_1")(x)


class Encoder(nn.Module):
    """Maps pixels to moments, up to the final 1x1 convolution."""

    config: VaeConfig
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(config.block_out_channels):
            step = "down" if i < last else None
            layers = config.layers_per_block
            x = VaeBlock(config, width, layers, step, self.dtype, name=f"down_blocks_{i}")(x)
        x = VaeMidBlock(config, self.dtype, self.attention, name="mid_block")(x)
        return _head(config, 2 * config.latent_channels, self.dtype, x)


class Decoder(nn.Module):
    """Maps latents to pixels, from after the first 1x1 convolution."""

    config: VaeConfig
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        config, last = self.config, len(self.config.block_out_channels) - 1
        x = Conv(config.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
        x = VaeMidBlock(config, self.dtype, self.attention, name="mid_block")(x)
        for i, width in enumerate(reversed(config.block_out_channels)):
            step = "up" if i < last else None
            layers = config.layers_per_block + 1
            x = VaeBlock(config, width, layers, step, self.dtype, name=f"up_blocks_{i}")(x)
        return _head(config, config.out_channels, self.dtype, x)


class Vae(nn.Module):
    """Encodes pixels in [-1, 1] as a Gaussian over latents, and decodes latents."""

    config: VaeConfig
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    def setup(self):
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype, self.attention)
        self.quant_conv = Conv(2 * channels, size=1, dtype=self.dtype)
        self.post_quant_conv = Conv(channels, size=1, dtype=self.dtype)
        self.decoder = Decoder(self.config, self.dtype, self.attention)

    def __call__(self, pixels: Float[Array, "B h w c"]) -> Float[Array, "B h w c2"]:
        """Returns the reconstruction of pixels from the mean of their posterior."""
        return self.decode(jnp.split(self.encode(pixels), 2, axis=-1)[0])

    def encode(self, pixels: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns the posterior's mean and log-variance in float32, concatenated along channels, unscaled.

        Raises:
          ValueError: the number of channels is not the config's, or height or width is not a multiple of
            `config.downscale`.
        """
        config = self.config
        _, height, width, channels = pixels.shape
        if channels != config.in_channels or height % config.downscale or width % config.downscale:
            raise ValueError(
                f"VAE: images are {pixels.shape[1:]}; this VAE takes {config.in_channels} channels (last "
                f"axis), and height and width that are multiples of {config.downscale}: resize or crop them."
            )
        moments = self.quant_conv(self.encoder(pixels)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)], axis=-1)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns pixels (about [-1, 1]) of latents that the caller has divided by the scaling factor.

        Raises:
          ValueError: the number of channels is not the config's.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"VAE: latents are {latents.shape}; the last axis must be "
                f"latent_channels={self.config.latent_channels}."
            )
        return self.decoder(self.post_quant_conv(latents))


def _resnet(config: VaeConfig, width: int, dtype: Any, name: str) -> ResnetBlock:
    return ResnetBlock(width, config.norm_num_groups, EPSILON, dtype=dtype, name=name)


def _head(config: VaeConfig, features: int, dtype: Any, x: Float[Array, "B h w c"]) -> Array:
    """Applies the final norm, SiLU and convolution of encoder and decoder; called in a compact method."""
    x = GroupNorm(config.norm_num_groups, EPSILON, dtype, silu=True, name="conv_norm_out")(x)
    return Conv(features, dtype=dtype, name="conv_out")(x)
