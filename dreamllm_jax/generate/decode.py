"""Prefill and decoding on a static cache: the jitted functions of every kind of generation.

All rows of a batch advance together. A row that waits, has ended or does not draw has no valid token
in a step, so its cache does not change.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dreamllm_jax.batch import Batch
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.kv_cache import KVCache, init_cache


@flax.struct.dataclass
class DecodeState:
    """How far each row has come: its KV cache, and the hidden state that predicts its next token."""

    cache: KVCache
    last: Float[Array, "B D"]


@flax.struct.dataclass
class DecodeRules:
    """Rules of decoding: `forbidden` tokens are never decoded, a token of `stops` ends a row's text.

    `dream_start` can be decoded only in rows where `may_dream` is true and at least `dream_room` tokens fit.
    """

    forbidden: Bool[Array, "V"]
    stops: Int[Array, " n"]
    dream_start: Int[Array, ""]
    may_dream: Bool[Array, "B"]
    dream_room: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def prefill(params: dict, batch: Batch, *, model: DreamLLMModule, capacity: int) -> DecodeState:
    """Runs prompts through the model: one per row, left-aligned, `segment_ids` 1 where there are tokens.

    Here and below, `params` are in the layout of generation (see `layout`), and `model` is `layered`.
    """
    assert model.config.llama is not None
    variables = {"params": params}
    embeds = model.apply(variables, batch, method=DreamLLMModule.embed)
    cache = init_cache(model.config.llama, embeds.shape[0], capacity, jnp.dtype(model.config.dtype))
    lengths = (batch.segment_ids > 0).sum(-1, dtype=jnp.int32)
    hidden, cache = model.apply(variables, embeds, lengths, cache, method=DreamLLMModule.prefill)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return DecodeState(cache, jnp.where(lengths[:, None] > 0, last, 0))


def _extend(
    model: DreamLLMModule, variables: dict, state: DecodeState, embeds: Array, valid: Array
) -> tuple[DecodeState, Array]:
    hidden, cache = model.apply(variables, embeds, valid, state.cache, method=DreamLLMModule.extend)
    end = jnp.maximum(valid.sum(-1) - 1, 0)
    last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    return DecodeState(cache, jnp.where(valid.any(-1)[:, None], last, state.last)), hidden


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"), donate_argnames="state")
def decode_text(
    params: dict,
    state: DecodeState,
    active: Bool[Array, "B"],
    budget: Int[Array, "B"],
    keys: Key[Array, "B"],
    control: DecodeRules,
    *,
    model: DreamLLMModule,
    max_new_tokens: int,
) -> tuple[DecodeState, Int[Array, "B M"], Int[Array, "B"]]:
    """Decodes text in the active rows until each has stopped, used up its budget, or filled its cache.

    Returns the state, the tokens (-1 after the last), and each row's stop token (-1: none). A
    stop token is not read: what follows it is the caller's business.
    """
    variables = {"params": params}
    rows, capacity = active.shape[0], state.cache.capacity

    def unfinished(carry):
        return carry[1].any()

    def one(carry):
        state, active, tokens, stop, written = carry
        logits = model.apply(variables, state.last[:, None], method=DreamLLMModule.logits)[:, 0]
        room = capacity - state.cache.lengths
        dream = jnp.arange(logits.shape[-1]) == control.dream_start
        no_dream = ~control.may_dream | (room < control.dream_room)
        logits = jnp.where(control.forbidden | (dream & no_dream[:, None]), -jnp.inf, logits)
        here = jax.vmap(jax.random.fold_in)(keys, state.cache.lengths)
        token = sample_tokens(logits, here, control.temperature, control.top_p)
        stopped = active & jnp.isin(token, control.stops)
        stop = jnp.where(stopped, token, stop)
        writes = active & ~stopped & (written < budget) & (room > 0)
        tokens = tokens.at[jnp.arange(rows), jnp.where(writes, written, max_new_tokens)].set(
            token, mode="drop"
        )
        embeds = model.apply(variables, token[:, None], method=DreamLLMModule.embed_text)
        state, _ = _extend(model, variables, state, embeds, writes[:, None])
        return state, writes, tokens, stop, written + writes

    start = (
        state,
        active,
        jnp.full((rows, max_new_tokens), -1, jnp.int32),
        jnp.full((rows,), -1, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
    )
    state, _, tokens, stop, _ = jax.lax.while_loop(unfinished, one, start)
    return state, tokens, stop


def sample_tokens(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, "B"]:
    """Returns one token per row: the most likely at temperature 0, else a sample from the nucleus.

    Nucleus (top-p) sampling is that of arXiv 1904.09751. A token at the nucleus's border comes with all
    tokens that are exactly as likely.
    """

    def sample() -> Array:
        scaled = logits.astype(jnp.float32) / temperature
        inside = in_nucleus(jax.nn.softmax(scaled), top_p)
        kept = jnp.where(inside, scaled, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def in_nucleus(probabilities: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """Returns which tokens are in the nucleus: the fewest that together have a probability of `top_p`.

    A token belongs to it if all more likely ones together have less than `top_p`. The border is found
    without sorting the vocabulary: positive floats have the order of their bit patterns, and the largest
    pattern above which there is a probability of `top_p` is searched three bits at a time.

    Example: probabilities [0.1, 0.4, 0.5] and `top_p` 0.6 give [False, True, True].
    """
    probabilities = probabilities.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)
    # The likeliest token always belongs to it, and at 1 every token does, however the sums are rounded.
    least = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), jnp.inf)
    border = jnp.full(len(bits), -1, jnp.int32)
    for shift in range(27, -1, -3):  # 30 bits: the pattern of 1.0 is 0x3f800000
        candidates = border[:, None] + (jnp.arange(1, 8, dtype=jnp.int32) << shift)
        above = bits[:, None] > candidates[:, :, None]
        mass = jnp.where(above, probabilities[:, None], 0).sum(-1)
        border += (mass >= least).sum(-1, dtype=jnp.int32) << shift
    return bits > border[:, None]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def dream(
    params: dict,
    state: DecodeState,
    active: Bool[Array, "B"],
    dream_start: Int[Array, ""],
    *,
    model: DreamLLMModule,
) -> tuple[DecodeState, Float[Array, "B Q X"], Float[Array, "B G"] | None]:
    """Appends `<dream_start>` and the dream queries in the active rows; returns the U-Net's conditions."""
    variables = {"params": params}
    rows = active.shape[0]
    start = model.apply(variables, dream_start[None, None], method=DreamLLMModule.embed_text)[0]
    block = jnp.concatenate(
        [start, model.apply(variables, method=DreamLLMModule.queries).astype(start.dtype)]
    )
    embeds = jnp.broadcast_to(block, (rows, *block.shape))
    valid = jnp.broadcast_to(active[:, None], embeds.shape[:2])
    state, hidden = _extend(model, variables, state, embeds, valid)
    context, pooled = model.apply(variables, hidden[:, 1:], method=DreamLLMModule.conditions)
    return state, context, pooled


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def append_image(
    params: dict,
    state: DecodeState,
    active: Bool[Array, "B"],
    images: Array | None,
    before: Int[Array, " n"],
    after: Int[Array, " m"],
    *,
    model: DreamLLMModule,
) -> DecodeState:
    """Appends the tokens `before`, the row's own drawing, and the tokens `after` in the active rows.

    `images` is uint8 [B h w 3], or None in a model that cannot see; `after` is appended only with an image.
    """
    variables = {"params": params}
    rows = active.shape[0]

    def fixed(tokens: Array) -> Array:
        embeds = model.apply(variables, tokens[None], method=DreamLLMModule.embed_text)
        return jnp.broadcast_to(embeds, (rows, *embeds.shape[1:]))

    parts = [fixed(before)]
    if images is not None:
        parts += [
            model.apply(variables, images, method=DreamLLMModule.see).astype(parts[0].dtype),
            fixed(after),
        ]
    embeds = jnp.concatenate(parts, axis=1)
    valid = jnp.broadcast_to(active[:, None], embeds.shape[:2])
    return _extend(model, variables, state, embeds, valid)[0]
