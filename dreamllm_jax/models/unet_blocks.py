"""The blocks of the U-Net and the VAE: resnets, resampling, the spatial transformer.

Parameter names are those of diffusers (`UNet2DConditionModel`, `AutoencoderKL`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.config.model import AttentionKernel as AttentionName
from dreamllm_jax.ops.activations import gelu, silu
from dreamllm_jax.ops.attention import attention
from dreamllm_jax.ops.conv import Conv
from dreamllm_jax.ops.linear import Dense
from dreamllm_jax.ops.norm import GroupNorm, LayerNorm
from dreamllm_jax.ops.scan import scan_layers
from dreamllm_jax.sharding import constrain


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions with a shortcut; the time embedding is added between them."""

    width: int
    groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], time: Float[Array, "B M"] | None = None
    ) -> Float[Array, "B h w c2"]:
        norm = partial(GroupNorm, self.groups, self.epsilon, self.dtype, silu=True)
        x = checkpoint_name(x, "layer_input")
        y = Conv(self.width, dtype=self.dtype, name="conv1")(norm(name="norm1")(x))
        if time is not None:
            shift = Dense(self.width, dtype=self.dtype, name="time_emb_proj")(silu(time))
            y = y + shift[:, None, None]
        y = Conv(self.width, dtype=self.dtype, name="conv2")(norm(name="norm2")(y))
        if x.shape[-1] != self.width:
            x = Conv(self.width, size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return constrain(x + y, "pictures", "height", "width", "channels")


class Downsample(nn.Module):
    """Halves height and width by a strided convolution; with padding on both sides they are rounded up."""

    padding: tuple[int, int]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, crops to `size` if given, then applies a convolution."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B h2 w2 c"]:
        rows, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (rows, height, 2, width, 2, channels))
        x = x.reshape(rows, 2 * height, 2 * width, channels)
        if size is not None:
            assert all(s in (2 * n - 1, 2 * n) for s, n in zip(size, (height, width), strict=True))
            x = x[:, : size[0], : size[1]]
        return Conv(channels, dtype=self.dtype, name="conv")(x)


class Attention(nn.Module):
    """Multi-head attention from x to the context, or to x itself without one, after an optional group norm.

    The softmax is always in float32, which is what `upcast_attention` requests in diffusers.
    """

    heads: int
    qkv_bias: bool = False
    norm_groups: int | None = None
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C"], context: Float[Array, "B S X"] | None = None
    ) -> Float[Array, "B L C"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"{width} channels are not divisible by {self.heads} attention heads.")
        if self.norm_groups is not None:
            x = GroupNorm(self.norm_groups, dtype=self.dtype, name="group_norm")(x)
        context = x if context is None else context

        def split(source: Float[Array, "B S X"], name: str) -> Float[Array, "B S N H"]:
            y = Dense(width, self.qkv_bias, dtype=self.dtype, name=name)(source)
            y = y.reshape(*y.shape[:2], self.heads, width // self.heads)
            return constrain(y, "pictures", None, "heads", "head_dim")

        q, k, v = split(x, "to_q"), split(context, "to_k"), split(context, "to_v")
        out = attention(q, k, v, implementation=self.attention, batch_axis="pictures")
        return Dense(width, dtype=self.dtype, name="to_out_0")(out.reshape(x.shape))


class Geglu(nn.Module):
    """`a * gelu(b)` for the two halves a and b of a linear map's output (arXiv 2002.05202)."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L F"]:
        hidden, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return constrain(hidden * gelu(gate), "pictures", None, "mlp")


class FeedForward(nn.Module):
    """A gated MLP whose hidden width is four times that of its input."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        hidden = Geglu(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """A pre-norm block of self-attention, cross-attention and MLP, as the body of a scan."""

    heads: int
    dtype: Any = jnp.float32
    attention: AttentionName = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L C"], context: Float[Array, "B S X"]
    ) -> tuple[Float[Array, "B L C"], None]:
        x = checkpoint_name(x, "layer_input")

        def normed(name: str) -> Float[Array, "B L C"]:
            return LayerNorm(1e-5, dtype=self.dtype, name=name)(x)

        attend = partial(Attention, self.heads, dtype=self.dtype, attention=self.attention)
        x = x + attend(name="attn1")(normed("norm1"))
        x = x + attend(name="attn2")(normed("norm2"), context)
        x = x + FeedForward(dtype=self.dtype, name="ff")(normed("norm3"))
        return constrain(x, "pictures", None, "embed"), None


class SpatialTransformer(nn.Module):
    """diffusers' `Transformer2DModel`: `depth` transformer blocks over the pixels, with a shortcut.

    The input and output projections are stored as 1x1 convolutions, unless `use_linear_projection` is set.
    """

    depth: int
    heads: int
    groups: int
    use_linear_projection: bool
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionName = "auto"
    scan_layers: bool | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], context: Float[Array, "B S X"]) -> Float[Array, "B h w c"]:
        rows, height, width, channels = x.shape
        project = Dense if self.use_linear_projection else partial(Conv, size=1)
        y = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)
        y = project(channels, dtype=self.dtype, name="proj_in")(y)
        stack = scan_layers(TransformerBlock, self.depth, self.remat, 1, self.scan_layers)
        stack = stack(self.heads, self.dtype, self.attention, name="transformer_blocks")
        # Constrained at the start of the scan, as are the gradients that leave it. Otherwise XLA's
        # partitioner computes wrong values when this scan runs inside another one (JAX 0.10).
        y = constrain(y.reshape(rows, height * width, channels), "pictures", None, "embed")
        y, _ = stack(y, constrain(context, "pictures", None, "embed"))
        y = project(channels, dtype=self.dtype, name="proj_out")(y.reshape(x.shape))
        return constrain(x + y, "pictures", "height", "width", "channels")
