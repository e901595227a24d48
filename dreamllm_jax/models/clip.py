"""CLIP's vision and text towers, and the contrastive head of their pretraining (arXiv 2103.00020)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.config.towers import ClipTextConfig, ClipVisionConfig
from dreamllm_jax.ops.activations import ACTIVATIONS
from dreamllm_jax.ops.attention import attention
from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.embedding import Embed
from dreamllm_jax.ops.linear import Dense
from dreamllm_jax.ops.norm import LayerNorm
from dreamllm_jax.ops.scan import scan_layers
from dreamllm_jax.sharding import constrain

# Mean and standard deviation of the pixels (RGB in [0, 1]) on which CLIP was trained.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The learned temperature may scale the logits at most by 100 (section 2.4).
MAX_LOGIT_SCALE = math.log(100.0)


def normalize_pixels(images: UInt8[Array, "*rows h w 3"]) -> Float[Array, "*rows h w 3"]:
    """Returns uint8 images as CLIP's normalized float32 pixels, computed on the device."""
    return (images.astype(jnp.float32) / 255 - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


class ClipAttention(nn.Module):
    """Multi-head self-attention with biases in all four linear maps."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], mask: Mask | None) -> Float[Array, "B L E"]:
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def split(name: str) -> Float[Array, "B L N H"]:
            out = Dense(width, dtype=self.dtype, name=name)(x)
            out = out.reshape(*out.shape[:-1], heads, width // heads)
            return constrain(out, "pictures", None, "heads", "head_dim")

        q, k, v = map(split, ("q_proj", "k_proj", "v_proj"))
        out = attention(q, k, v, mask, implementation=self.attention, batch_axis="pictures")
        return Dense(width, dtype=self.dtype, name="out_proj")(out.reshape(x.shape))


class ClipMlp(nn.Module):
    """`fc2(activation(fc1(x)))`."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        hidden = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        hidden = constrain(ACTIVATIONS[self.config.hidden_act](hidden), "pictures", None, "mlp")
        return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(hidden)


class ClipLayer(nn.Module):
    """One pre-norm transformer layer, as the body of a scan."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"

    def setup(self):
        epsilon = self.config.layer_norm_eps
        self.layer_norm1 = LayerNorm(epsilon, dtype=self.dtype)
        self.self_attn = ClipAttention(self.config, self.dtype, self.attention)
        self.layer_norm2 = LayerNorm(epsilon, dtype=self.dtype)
        self.mlp = ClipMlp(self.config, self.dtype)

    def __call__(self, x: Float[Array, "B L E"], mask: Mask | None) -> tuple[Float[Array, "B L E"], None]:
        x = checkpoint_name(x, "layer_input")
        x = x + self.self_attn(self.layer_norm1(x), mask)
        x = x + self.mlp(self.layer_norm2(x))
        return constrain(x, "pictures", None, "embed"), None


class ClipEncoder(nn.Module):
    """The stack of layers, of which a call may run any contiguous range."""

    config: ClipVisionConfig | ClipTextConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    scan_layers: bool | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L E"], mask: Mask | None, start: int, stop: int
    ) -> Float[Array, "B L E"]:
        """Runs layers `start` to `stop - 1`. Initialization creates the parameters of all layers."""
        depth = self.config.num_hidden_layers
        if self.is_initializing():
            start, stop = 0, depth
        if start == stop:
            return x
        stack = scan_layers(ClipLayer, stop - start, self.remat, 1, self.scan_layers)
        if stop - start < depth:
            stack = nn.map_variables(
                stack, "params", lambda params: jax.tree.map(lambda leaf: leaf[start:stop], params)
            )
        return stack(self.config, self.dtype, self.attention, name="layers")(x, mask)[0]


class VisionEmbeddings(nn.Module):
    """The class token and linearly embedded patches, with learned positions added."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w c"]) -> Float[Array, "B {self.config.num_patches}+1 E"]:
        config, width = self.config, self.config.hidden_size
        expected = (config.image_size, config.image_size, config.num_channels)
        if pixels.shape[1:] != expected:
            raise ValueError(
                f"CLIP vision: images are {pixels.shape[1:]}; this tower takes {expected} (height, width, "
                "channels): resize and crop them."
            )
        patches = PatchEmbedding(config, self.dtype, name="patch_embedding")(pixels)
        init = nn.initializers.normal(width**-0.5)
        token = self.param("class_embedding", init, (width,)).astype(self.dtype)
        token = jnp.broadcast_to(token, (len(patches), 1, width))
        positions = Embed(config.num_patches + 1, width, dtype=self.dtype, name="position_embedding")
        return jnp.concatenate([token, patches], axis=1) + positions(jnp.arange(config.num_patches + 1))


class PatchEmbedding(nn.Module):
    """A convolution whose stride equals its kernel size, computed as a matrix product."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w c"]) -> Float[Array, "B P E"]:
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        rows, *_, channels = pixels.shape
        shape = (size, size, channels, self.config.hidden_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).astype(self.dtype)
        patches = pixels.astype(self.dtype).reshape(rows, side, size, side, size, channels).swapaxes(2, 3)
        return patches.reshape(rows, side**2, -1) @ kernel.reshape(-1, shape[-1])


class ClipVision(nn.Module):
    """`transformers.CLIPVisionModel`, on pixels that `normalize_pixels` returns."""

    config: ClipVisionConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    scan_layers: bool | None = None

    def setup(self):
        epsilon = self.config.layer_norm_eps
        self.embeddings = VisionEmbeddings(self.config, self.dtype)
        self.pre_layrnorm = LayerNorm(epsilon, dtype=self.dtype)  # Hugging Face's spelling
        self.encoder = ClipEncoder(self.config, self.dtype, self.remat, self.attention, self.scan_layers)
        self.post_layernorm = LayerNorm(epsilon, dtype=self.dtype)

    def __call__(
        self, pixels: Float[Array, "B h w c"], select_layer: int = -1
    ) -> Float[Array, "B {self.config.num_patches}+1 E"]:
        """Returns transformers' `hidden_states[select_layer]`, class token first. Later layers do not run.

        0 selects the normalized embeddings, -1 the output of the last layer (before `post_layernorm`).

        Raises:
          ValueError: the size of the pixels is not the config's, or the layer does not exist.
        """
        stop = _hidden_state(select_layer, self.config.num_hidden_layers)
        x = self.pre_layrnorm(self.embeddings(pixels))
        x = self.encoder(constrain(x, "pictures", None, "embed"), None, 0, stop)
        if self.is_initializing():
            self.post_layernorm(x)
        return x

    def pooled(self, pixels: Float[Array, "B h w c"]) -> Float[Array, "B E"]:
        """Returns transformers' `pooler_output`: the normalized class token after the last layer."""
        return self.post_layernorm(self(pixels)[:, 0])


class TextEmbeddings(nn.Module):
    """Token embeddings plus learned position embeddings."""

    config: ClipTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L X"]:
        config, length = self.config, tokens.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"CLIP text: {length} tokens; this tower takes at most {config.max_position_embeddings}: "
                "truncate the text."
            )
        embed = Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, name="token_embedding")
        positions = Embed(
            config.max_position_embeddings, config.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        return embed(tokens) + positions(jnp.arange(length))


class ClipText(nn.Module):
    """`transformers.CLIPTextModel`. It is causal, so tokens after the end token change nothing before it."""

    config: ClipTextConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool | None = None

    def setup(self):
        self.embeddings = TextEmbeddings(self.config, self.dtype)
        self.encoder = ClipEncoder(self.config, self.dtype, self.remat, scan_layers=self.scan_layers)
        self.final_layer_norm = LayerNorm(self.config.layer_norm_eps, dtype=self.dtype)

    def __call__(
        self, tokens: Int[Array, "B L"], select_layer: int = -1
    ) -> tuple[Float[Array, "B L X"], Float[Array, "B X"]]:
        """Returns the states of all tokens, and the pooled state: the last layer's at the end token.

        By default the states are transformers' `last_hidden_state`: those of the last layer, normalized,
        which Stable Diffusion 1 and 2 use. For an earlier layer they are `hidden_states[select_layer]`,
        without the final norm (SDXL uses -2). The pooled state is always normalized.

        Raises:
          ValueError: there are more tokens than positions, or the layer does not exist.
        """
        depth = self.config.num_hidden_layers
        stop = _hidden_state(select_layer, depth)
        mask = Mask(causal=True)
        states = constrain(self.embeddings(tokens), "pictures", None, "embed")
        states = self.encoder(states, mask, 0, stop)
        last = states if stop == depth else self.encoder(states, mask, stop, depth)
        last = self.final_layer_norm(last)
        pooled = last[jnp.arange(len(tokens)), self._ends(tokens)]
        return (last if stop == depth else states), pooled

    def _ends(self, tokens: Int[Array, "B L"]) -> Int[Array, "B"]:
        """Returns the first position of the end token in each row.

        Old configs give the id 2 for it and mean the highest id in the row.
        """
        end = self.config.eos_token_id
        return jnp.argmax(tokens if end == 2 else tokens == end, axis=-1)


class ContrastiveHead(nn.Module):
    """Projects the pooled states of both towers to a shared space: the rest of `transformers.CLIPModel`."""

    features: int
    dtype: Any = jnp.float32

    def setup(self):
        self.visual_projection = Dense(self.features, use_bias=False, dtype=self.dtype)
        self.text_projection = Dense(self.features, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def __call__(
        self, images: Float[Array, "B E"], texts: Float[Array, "B2 X"]
    ) -> tuple[Float[Array, "B M"], Float[Array, "B2 M"], Float[Array, ""]]:
        """Returns unit vectors of images and texts in float32, and the scale of their cosine similarities."""
        scale = jnp.exp(jnp.minimum(self.logit_scale.astype(jnp.float32), MAX_LOGIT_SCALE))
        return _unit(self.visual_projection(images)), _unit(self.text_projection(texts)), scale


def _unit(x: Float[Array, "B M"]) -> Float[Array, "B M"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _hidden_state(select_layer: int, depth: int) -> int:
    """Returns the number of layers before `hidden_states[select_layer]`."""
    if not -depth - 1 <= select_layer <= depth:
        raise ValueError(
            f"CLIP: select_layer={select_layer}; a tower of {depth} layers has the hidden states "
            f"{-depth - 1} to {depth}."
        )
    return select_layer % (depth + 1)
