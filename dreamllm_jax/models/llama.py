"""LLaMA: the language model, over packed rows or on a key/value cache (arXiv 2302.13971).

Embeddings go in and hidden states come out, so that images and dream queries enter as vectors.
Rotary positions follow arXiv 2104.09864, in the half-split layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.models.attention import attention, masks
from dreamllm_jax.models.layers import Dense, Embed, RMSNorm, linear, scan_layers, silu
from dreamllm_jax.sharding import activation_spec, constrain, mesh_axes

Params = Mapping[str, Any]
Rotation = tuple[Float[Array, "B L half"], Float[Array, "B L half"]]  # cosines and sines


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers; row b holds `lengths[b]` tokens, what lies behind is never seen.

    Under dynamic rotary scaling the keys are stored unrotated, since their angles change as the row
    grows. A length past the capacity S says that tokens were dropped: the caller gave too little.

    Each head's entries lie together, as the products of attention read them: nothing is turned around for
    every new token.
    """

    k: Float[Array, "layers B K S H"]
    v: Float[Array, "layers B K S H"]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S: the tokens a row has room for."""
        return self.k.shape[3]


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache of `batch` rows with room for `capacity` tokens each."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


@flax.struct.dataclass
class LayerContext:
    """What every layer shares: angles of the new tokens, who sees whom, and the cache's bookkeeping.

    `slots[b, l]` is the cache entry that token l is written to, or the capacity (nowhere);
    `read_rotation` are the angles of all entries where keys are stored unrotated.
    """

    rotation: tuple[Any, Any]
    mask: masks.Mask
    slots: Int[Array, "B L"] | None = None
    read_rotation: tuple[Any, Any] | None = None


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], context: LayerContext, cache: KVCache | None, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        c = self.config
        linear = partial(Dense, use_bias=c.attention_bias, dtype=self.dtype, kernel_init=_normal(c))

        def heads(name: str, number: int, axis: str) -> jax.Array:
            y = linear(number * c.head_dim, name=name)(x).reshape(*x.shape[:2], number, c.head_dim)
            # Pinned here too, or XLA gathers x along its length, and multiplies the whole of it everywhere.
            return constrain(y, "batch", "length", axis, "head_dim")

        q = rotate(heads("q_proj", c.num_attention_heads, "heads"), context.rotation)
        k = heads("k_proj", c.num_key_value_heads, "kv_heads")
        v = heads("v_proj", c.num_key_value_heads, "kv_heads")
        if context.read_rotation is None:
            k = rotate(k, context.rotation)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            place = (layer, rows, slice(None), context.slots)
            cache = cache.replace(
                k=cache.k.at[place].set(k.astype(cache.k.dtype), mode="drop"),
                v=cache.v.at[place].set(v.astype(cache.v.dtype), mode="drop"),
            )
            k, v = (jnp.swapaxes(y[layer], 1, 2) for y in (cache.k, cache.v))
        if context.read_rotation is not None:
            k = rotate(k, context.read_rotation)
        # A split length is gathered here: every query may look at the whole row.
        k, v = (constrain(y, "batch", None, "kv_heads", "head_dim") for y in (k, v))
        out = attention(q, k, v, context.mask, implementation=self.attention)
        return linear(c.hidden_size, name="o_proj")(out.reshape(*x.shape[:2], -1)), cache


class LlamaMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202)."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        linear = partial(Dense, use_bias=False, dtype=self.dtype, kernel_init=_normal(c))
        gate = linear(c.intermediate_size, name="gate_proj")(x)
        up = linear(c.intermediate_size, name="up_proj")(x)
        return linear(c.hidden_size, name="down_proj")(constrain(silu(gate) * up, "batch", "length", "mlp"))


class LlamaLayer(nn.Module):
    """One pre-norm transformer layer, as the body of a scan over (states, cache, layer's number)."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: AttentionKernel = "auto"

    @nn.compact
    def __call__(self, carry: tuple[Any, KVCache | None, Any], context: LayerContext):
        x, cache, layer = carry
        x = checkpoint_name(x, "layer_input")
        norm = partial(RMSNorm, epsilon=self.config.rms_norm_eps, dtype=self.dtype)
        attend = LlamaAttention(self.config, self.dtype, self.attention, name="self_attn")
        seen, cache = attend(norm(name="input_layernorm")(x), context, cache, layer)
        x = x + seen
        x = x + LlamaMlp(self.config, self.dtype, name="mlp")(norm(name="post_attention_layernorm")(x))
        return (constrain(x, "batch", "length", "embed"), cache, layer + 1), None


class Llama(nn.Module):
    """The language model. `init` through any method makes all parameters.

    `tables_gathered` says that the embeddings come gathered along fsdp (see `embedding_lookup`).
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: AttentionKernel = "auto"
    tables_gathered: bool = False

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=_normal(c))
        self.layers = scan_layers(LlamaLayer, c.num_hidden_layers, self.remat, inputs=1)(
            c, self.dtype, self.attention
        )
        self.norm = RMSNorm(c.rms_norm_eps, dtype=self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(c.vocab_size, use_bias=False, kernel_init=_normal(c))

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of token ids; an id outside the vocabulary gives NaN."""
        return embedding_lookup(self.embed_tokens.embedding.astype(self.dtype), tokens, self.tables_gathered)

    def __call__(
        self,
        embeds: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm; every segment as if it stood alone in its row.

        `positions` restart at 0 in each segment; segment 0 is padding, whose states mean nothing.
        """
        lengths = _segment_lengths(positions, segment_ids)
        context = LayerContext(rotations(self.config, positions, lengths), masks.packed(segment_ids))
        return self._run(embeds, context, None)[0]

    def extend(
        self,
        embeds: Float[Array, "B L D"],
        valid: Bool[Array, "B L"],
        cache: KVCache,
        layers: Sequence[Params] | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache]:
        """Appends each row's valid tokens to its cache; hidden states (final norm) and the new cache.

        A row may have any number of valid tokens, also none; the states of invalid ones mean
        nothing. Rows never influence each other. Tokens that do not fit are dropped and entries
        that are there stay whole, but `lengths` count on: check the room before.

        Under dynamic rotary scaling past `max_position_embeddings`, keys and queries of one chunk
        agree on the frequencies of the row's present length; states computed by earlier chunks stay.

        `layers` are the weights as `unstack_layers` gives them, in place of the stacked ones.
        """
        positions = cache.lengths[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        lengths = cache.lengths + valid.sum(axis=1, dtype=jnp.int32)
        read_rotation = None
        if _dynamic(self.config):
            entries = jnp.broadcast_to(jnp.arange(cache.capacity), (len(lengths), cache.capacity))
            read_rotation = rotations(self.config, entries, lengths[:, None])
        context = LayerContext(
            rotation=rotations(self.config, positions, lengths[:, None]),
            mask=masks.cached(positions, valid),
            slots=jnp.where(valid, positions, cache.capacity),
            read_rotation=read_rotation,
        )
        hidden, cache = self._run(embeds, context, cache, layers)
        assert cache is not None
        return hidden, cache.replace(lengths=lengths)

    def head(self) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits, in `dtype`; transposed embeddings where they are tied."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding.astype(self.dtype).T
        return self.lm_head.get_variable("params", "kernel").astype(self.dtype)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Scores of the next token, float32 whatever `dtype` is."""
        if self.is_initializing() and not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        out = linear(hidden.astype(self.dtype), self.head(), jnp.float32)
        return constrain(out, "batch", "length", "vocab") if out.ndim == 3 else out

    def _run(
        self,
        embeds: jax.Array,
        context: LayerContext,
        cache: KVCache | None,
        layers: Sequence[Params] | None = None,
    ):
        x = constrain(embeds.astype(self.dtype), "batch", "length", "embed")
        if layers is None:
            (x, cache, _), _ = self.layers((x, cache, jnp.int32(0)), context)
        else:
            layer = LlamaLayer(self.config, self.dtype, self.attention, parent=None)
            for number, weights in enumerate(layers):
                (x, cache, _), _ = layer.apply({"params": weights}, (x, cache, jnp.int32(number)), context)
        hidden = self.norm(x)
        if self.is_initializing():
            self.embed(jnp.zeros(embeds.shape[:2], jnp.int32))
            self.logits(hidden)
        return hidden, cache


def unstack_layers(params: Params) -> list[Params]:
    """Of the model's parameters, each layer's own: for a program that goes through them again and again.

    From a stack XLA's CPU backend copies a layer's weights each time before it multiplies by them, and where
    they do not fit its caches that takes longer than the product. These are a second copy of all layers, made
    once in every run of the program.
    """
    number = len(jax.tree.leaves(params["layers"])[0])
    apart = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(number)]
    return jax.lax.optimization_barrier(apart)  # else XLA slices where the weights are needed, as before


def embedding_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B L"], whole: bool = False
) -> Float[Array, "B L D"]:
    """The table's rows at token ids; an id outside the vocabulary gives NaN.

    On a mesh the table is gathered along fsdp, unless it comes `whole`, and looked up where the tokens are:
    less traffic than moving what was found. Every device adds up the gradient of its own tokens, which is
    scattered along fsdp (XLA for TPUs may make it an all-reduce, of which a part is kept).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, tokens, axis=0)
    rows = activation_spec(("batch", "length", None), (*tokens.shape, 0), mesh)
    split = activation_spec(("vocab", None), table.shape, mesh)[0]
    # Devices that hold the same rows must not gather each for itself: then the partitioner gathers.
    sliced = not whole and "fsdp" in mesh_axes(rows[0]) and table.shape[1] % mesh.shape["fsdp"] == 0

    def local(table: Array, tokens: Array) -> Array:
        if sliced:
            table = jax.lax.all_gather(table, "fsdp", axis=1, tiled=True)
        if split is None:
            return jnp.take(table, tokens, axis=0)
        tokens = tokens - len(table) * jax.lax.axis_index("tensor")
        here = (tokens >= 0) & (tokens < len(table))
        found = jnp.take(table, jnp.where(here, tokens, 0), axis=0)
        found = jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")
        known = jax.lax.psum(here.astype(jnp.int32), "tensor") > 0
        return jnp.where(known[..., None], found, jnp.nan)

    places = (PartitionSpec(split, "fsdp" if sliced else None), PartitionSpec(*rows[:2]))
    return jax.shard_map(local, in_specs=places, out_specs=rows)(table, tokens)


def rotations(config: LlamaConfig, positions: Int[Array, "B L"], lengths: Int[Array, "B #L"]) -> Rotation:
    """Cosines and sines of the rotary angles at `positions` of sequences `lengths` long, float32.

    Pair i of H/2 turns by `position * theta^(-2i/H)` (arXiv 2104.09864, eq. 15). Linear scaling
    divides positions by its factor s (arXiv 2306.15595); dynamic scaling multiplies theta by
    `(s n/m - s + 1)^(H/(H-2))` for a length n beyond the m positions of pretraining.
    """
    scaling, width = config.rope_scaling, config.head_dim
    exponents = np.arange(0, width, 2) / width
    frequencies = jnp.asarray(config.rope_theta**-exponents, jnp.float32)
    if scaling is not None and scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    if scaling is not None and scaling.type == "dynamic":
        known = config.max_position_embeddings
        stretch = scaling.factor * jnp.maximum(lengths, known) / known - (scaling.factor - 1)
        growth = exponents * width / (width - 2)
        frequencies = frequencies * stretch[..., None] ** jnp.asarray(-growth, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B L N H"], rotation: Rotation) -> Float[Array, "B L N H"]:
    """Turns the pairs (i, i + H/2) of every head by its position's angles, in float32."""
    cos, sin = (y[:, :, None] for y in rotation)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _segment_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """[B, L]: of each position, the length of its segment: the last position in it + 1."""
    most = jax.vmap(partial(jax.ops.segment_max, num_segments=positions.shape[1] + 1))(positions, segment_ids)
    return jnp.take_along_axis(most, segment_ids, axis=1) + 1


def _dynamic(config: LlamaConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.type == "dynamic"


def _normal(config: LlamaConfig) -> Any:
    return nn.initializers.normal(config.initializer_range)
