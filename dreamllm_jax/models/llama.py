"""LLaMA: the language model, on packed rows or on a key-value cache (arXiv 2302.13971).

It maps embeddings to hidden states, so that images and dream queries can enter as vectors. Rotary position
embeddings follow arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.models.kv_cache import KVCache
from dreamllm_jax.ops.activations import silu
from dreamllm_jax.ops.attention import attention, masks
from dreamllm_jax.ops.embedding import Embed, embedding_lookup
from dreamllm_jax.ops.linear import Dense, DenseGeneral, scaled_linear
from dreamllm_jax.ops.norm import RMSNorm
from dreamllm_jax.ops.scan import scan_layers
from dreamllm_jax.sharding import constrain

Rotation = tuple[Float[Array, "B L half"], Float[Array, "B L half"]]  # cosines and sines


@flax.struct.dataclass
class LayerContext:
    """The inputs that all layers share: rotary angles, the attention mask and cache entries.

    `rotation` holds the angles of the new tokens. `entries[b, l]` is the cache entry that token l is written
    to; the entry after the capacity drops the token. Without `entries` the tokens are the first of an empty
    cache, and attend to each other only. `key_rotation` holds the angles of the keys that are attended to, if
    the cache stores unrotated keys.
    """

    rotation: tuple[Any, Any]
    mask: masks.Mask
    entries: Int[Array, "B L"] | None = None
    key_rotation: tuple[Any, Any] | None = None


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    `joined` says that one product computes queries, keys and values: see `generate.layout`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"
    joined: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: LayerContext, cache: KVCache | None, layer: int
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        c = self.config
        q, k, v = self._joined_heads(x) if self.joined else self._separate_heads(x)
        q = rotate(q, context.rotation)
        if context.key_rotation is None:
            k = rotate(k, context.rotation)
        if cache is not None:
            if context.entries is None:
                cache = cache.write_first(layer, k, v)
            else:
                cache = cache.write(layer, k, v, context.entries)
                k, v = cache.read(layer)
        if context.key_rotation is not None:
            k = rotate(k, context.key_rotation)
        # This gathers a sharded length: a query may attend to its whole row.
        k, v = (constrain(y, "batch", None, "kv_heads", "head_dim") for y in (k, v))
        out = attention(q, k, v, context.mask, implementation=self.attention)
        project = _projection(c, self.dtype, self.joined, c.attention_bias)
        return project(c.hidden_size, name="o_proj")(out.reshape(*x.shape[:2], -1)), cache

    def _separate_heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns queries [B, L, N, H], keys and values [B, L, K, H] by three products."""
        c = self.config
        assert c.num_key_value_heads is not None and c.head_dim is not None
        width = c.head_dim
        linear = _projection(c, self.dtype, self.joined, c.attention_bias)

        def heads(name: str, number: int, axis: str) -> jax.Array:
            y = linear(number * width, name=name)(x).reshape(*x.shape[:2], number, width)
            # Constrained here too: otherwise XLA gathers x along its length, and every device multiplies all
            # of it.
            return constrain(y, "batch", "length", axis, "head_dim")

        return (
            heads("q_proj", c.num_attention_heads, "heads"),
            heads("k_proj", c.num_key_value_heads, "kv_heads"),
            heads("v_proj", c.num_key_value_heads, "kv_heads"),
        )

    def _joined_heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns what `_separate_heads` returns by one product.

        Its columns are K groups. A group has the N / K query heads that share a key, the key and the value.
        """
        c = self.config
        assert c.num_key_value_heads is not None and c.head_dim is not None
        groups, shared = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
        columns = groups * (shared + 2) * c.head_dim
        linear = _projection(c, self.dtype, self.joined, c.attention_bias)
        y = linear(columns, name="qkv_proj")(x).reshape(*x.shape[:2], groups, shared + 2, c.head_dim)
        y = constrain(y, "batch", "length", "kv_heads", None, "head_dim")
        q = y[..., :shared, :].reshape(*x.shape[:2], c.num_attention_heads, c.head_dim)
        return q, y[..., shared, :], y[..., shared + 1, :]


class LlamaMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202).

    `joined` says that one product computes gate and up.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    joined: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        linear = _projection(c, self.dtype, self.joined, use_bias=False)
        if self.joined:
            both = linear((2, c.intermediate_size), name="gate_up_proj")(x)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate = linear(c.intermediate_size, name="gate_proj")(x)
            up = linear(c.intermediate_size, name="up_proj")(x)
        hidden = silu(gate, prevent_cse=False) * up
        return linear(c.hidden_size, name="down_proj")(constrain(hidden, "batch", "length", "mlp"))


class LlamaLayer(nn.Module):
    """One pre-norm transformer layer. Returns the new states and the cache, if it is given one."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"
    joined: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: LayerContext,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        x = checkpoint_name(x, "layer_input")
        norm = partial(RMSNorm, epsilon=self.config.rms_norm_eps, dtype=self.dtype)
        self_attention = LlamaAttention(
            self.config, self.dtype, self.attention, self.joined, name="self_attn"
        )
        attended, cache = self_attention(norm(name="input_layernorm")(x), context, cache, layer)
        x = x + attended
        mlp = LlamaMlp(self.config, self.dtype, self.joined, name="mlp")
        x = x + mlp(norm(name="post_attention_layernorm")(x))
        return constrain(x, "batch", "length", "embed"), cache


class Llama(nn.Module):
    """The language model. `init` through any method creates all parameters.

    `tables_gathered` says that the embedding table is already gathered along fsdp (see `embedding_lookup`).
    `layered` says that the parameters are in the layout of generation: every layer by itself, `layers_0` and
    so on, with joined projections (see `generate.layout`). Otherwise the layers are stacked on axis 0, and
    `scan_layers` says whether they are a loop (see `ops.scan`).
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    tables_gathered: bool = False
    layered: bool = False
    scan_layers: bool | None = None

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=_normal(c))
        layers: Any = None
        if self.layered:
            layer = partial(LlamaLayer, c, self.dtype, self.attention, joined=True)
            layers = [layer() for _ in range(c.num_hidden_layers)]
        else:
            scanned = scan_layers(LlamaLayer, c.num_hidden_layers, self.remat, 1, self.scan_layers)
            layers = scanned(c, self.dtype, self.attention)
        self.layers = layers  # flax names the members of a list layers_0, layers_1, ...
        self.norm = RMSNorm(c.rms_norm_eps, dtype=self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(c.vocab_size, use_bias=False, kernel_init=_normal(c))

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the embeddings of token ids; an id outside the vocabulary gives NaN."""
        return embedding_lookup(self.embed_tokens.embedding.astype(self.dtype), tokens, self.tables_gathered)

    def __call__(
        self,
        embeds: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
        segment_lengths: Int[Array, "B M"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the hidden states after the final norm. Segments of a row do not influence each other.

        `positions` restart at 0 in each segment. Segment 0 is padding, and its states are meaningless.
        `segment_lengths` makes attention cheaper on GPUs (see `Batch`).
        """
        lengths = _segment_lengths(positions, segment_ids)
        mask = masks.packed(segment_ids, segment_lengths)
        context = LayerContext(rotations(self.config, positions, lengths), mask)
        return self._run(embeds, context, None)[0]

    def prefill(
        self, embeds: Float[Array, "B L D"], lengths: Int[Array, "B"], cache: KVCache
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        """Fills an empty cache with left-aligned rows. Returns hidden states (final norm) and the new cache.

        Row b holds the first `lengths[b]` embeddings; the states of the others are meaningless. A prompt
        attends to itself, whatever the capacity of the cache is. `layered` parameters only.
        """
        positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
        rotation = rotations(self.config, positions, lengths[:, None])
        context = LayerContext(
            rotation, masks.Mask(causal=True), key_rotation=rotation if _dynamic(self.config) else None
        )
        hidden, written = self._run(embeds, context, cache)
        assert written is not None
        return hidden, dataclasses.replace(written, lengths=lengths)

    def extend(
        self,
        embeds: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        """Appends each row's valid tokens to its cache. Returns hidden states (final norm) and the new cache.

        A row may have any number of valid tokens, including none. The states of invalid tokens are
        meaningless. Rows do not influence each other. Tokens beyond the capacity are dropped and leave the
        cache's entries intact, but `lengths` counts them: check the capacity before the call. `layered`
        parameters only.

        Example: a cache with lengths [2, 5], and 3 new embeddings per row.

            valid        [[1, 1, 1], [1, 0, 0]]
            positions    [[2, 3, 4], [5, 5, 5]]   the cache entries of the valid tokens
            new lengths  [5, 6]

        Under dynamic rotary scaling beyond `max_position_embeddings`, the keys and queries of one call use
        the frequencies of the row's current length. States that earlier calls computed do not change.
        """
        positions = cache.lengths[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        lengths = cache.lengths + valid.sum(axis=1, dtype=jnp.int32)
        key_rotation = None
        if _dynamic(self.config):
            entries = jnp.arange(cache.k.shape[3])
            entries = jnp.broadcast_to(entries, (len(lengths), len(entries)))
            key_rotation = rotations(self.config, entries, lengths[:, None])
        context = LayerContext(
            rotation=rotations(self.config, positions, lengths[:, None]),
            mask=masks.cached(positions, valid),
            entries=jnp.where(valid, jnp.minimum(positions, cache.capacity), cache.capacity),
            key_rotation=key_rotation,
        )
        hidden, written = self._run(embeds, context, cache)
        assert written is not None
        return hidden, dataclasses.replace(written, lengths=lengths)

    def head(self) -> Float[Array, "D V"]:
        """Returns the matrix from hidden states to logits in `dtype`: the transposed embeddings if tied.

        If it is int8, the result still lacks its scales.
        """
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding.astype(self.dtype).T
        return self.lm_head.get_variable("params", "kernel").astype(self.dtype)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Returns the logits of the next token, in float32 whatever `dtype` is."""
        if self.is_initializing() and not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        scale = (
            None if self.config.tie_word_embeddings else self.lm_head.get_variable("params", "kernel_scale")
        )
        out = scaled_linear(hidden.astype(self.dtype), self.head(), scale, jnp.float32)
        return constrain(out, "batch", "length", "vocab") if out.ndim == 3 else out

    def _run(self, embeds: jax.Array, context: LayerContext, cache: KVCache | None):
        x = constrain(embeds.astype(self.dtype), "batch", "length", "embed")
        if self.layered:
            for index, layer in enumerate(self.layers):
                x, cache = layer(x, context, cache, index)
        else:
            assert cache is None, "a cache needs parameters in the layout of generation"
            x, _ = self.layers(x, context)
        hidden = self.norm(x)
        if self.is_initializing():
            self.embed(jnp.zeros(embeds.shape[:2], jnp.int32))
            self.logits(hidden)
        return hidden, cache


def rotations(config: LlamaConfig, positions: Int[Array, "B L"], lengths: Int[Array, "B #L"]) -> Rotation:
    """Returns cosines and sines of the rotary angles at `positions` in sequences of `lengths`, in float32.

    Pair i of the H/2 pairs is rotated by `position * theta^(-2i/H)` (arXiv 2104.09864, eq. 15). Linear
    scaling divides positions by its factor s (arXiv 2306.15595). Dynamic scaling multiplies theta by `(s n/m
    - s + 1)^(H/(H-2))` for a length n greater than the m positions of pretraining.
    """
    scaling, width = config.rope_scaling, config.head_dim
    assert width is not None
    exponents = np.arange(0, width, 2) / width
    frequencies = jnp.asarray(config.rope_theta**-exponents, jnp.float32)
    if scaling is not None and scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.type == "dynamic":
        pretrained = config.max_position_embeddings
        stretch = scaling.factor * jnp.maximum(lengths, pretrained) / pretrained - (scaling.factor - 1)
        growth = exponents * width / (width - 2)
        frequencies = frequencies * stretch[..., None] ** jnp.asarray(-growth, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N H"], rotation: Rotation) -> Float[Array, "B L N H"]:
    """Rotates the pairs (i, i + H/2) of every head by the angles of its position, in float32."""
    cos, sin = (y[:, :, None] for y in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _segment_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns, for each position [B, L], the length of its segment: the segment's last position plus 1."""
    last = jax.vmap(partial(jax.ops.segment_max, num_segments=positions.shape[1] + 1))(positions, segment_ids)
    return jnp.take_along_axis(last, segment_ids, axis=1) + 1


def _projection(config: LlamaConfig, dtype: Any, joined: bool, use_bias: bool) -> Any:
    """Returns the class of a layer's products: with `joined` projections, kernels may be int8."""
    kind = DenseGeneral if joined else Dense
    return partial(kind, use_bias=use_bias, dtype=dtype, kernel_init=_normal(config))


def _dynamic(config: LlamaConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.type == "dynamic"


def _normal(config: LlamaConfig) -> nn.initializers.Initializer:
    return nn.initializers.normal(config.initializer_range)
