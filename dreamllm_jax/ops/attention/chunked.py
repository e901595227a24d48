"""The reference for some queries at a time: all scores are never in memory at once (arXiv 2112.05682)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.attention.reference import reference_attention
from dreamllm_jax.sharding import constrain

# Enough queries to keep a matrix unit busy. Their scores for 4,096 keys take 4 MiB per head.
QUERIES = 256


def chunked_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    axes: tuple[str | None, str | None] = ("batch", "length"),
    queries: int = QUERIES,
) -> Float[Array, "B L N H"]:
    """Returns what `reference_attention` returns, computed for at most `queries` queries at a time.

    The backward pass recomputes the scores. `axes` are the logical axes of rows and queries. Of n chunks,
    chunk j takes queries j, j + n, j + 2n, ...: where the length is sharded, each device keeps its own
    queries.
    """
    length = q.shape[1]
    chunks = -(-length // queries)
    if chunks == 1:
        return reference_attention(q, k, v, mask)
    padding = -length % chunks

    def split(x: Array) -> Array:
        """Splits the length: [#B, L, ...] -> [n, #B, L / n, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, chunks, *x.shape[2:]), 2, 0)

    rule = Mask() if mask is None else mask.per_query(length)
    if rule.key_lengths is not None and rule.key_lengths.shape[1] == 1:
        lengths = jnp.broadcast_to(rule.key_lengths, (len(rule.key_lengths), length))
        rule = dataclasses.replace(rule, key_lengths=lengths)
    # float32, because the gradients of keys and values are summed over the chunks in this dtype.
    keys_values = [x.astype(jnp.float32) for x in (k, v)]

    @jax.checkpoint
    def attend(q: Array, ids: Array | None, lengths: Array | None, keys_values: list[Array]) -> Array:
        part = Mask(ids, rule.key_segment_ids, lengths)
        keys, values = (x.astype(q.dtype) for x in keys_values)
        return reference_attention(q, keys, values, part, name_output=False)

    q_chunks = constrain(split(q), None, *axes, "heads", "head_dim")
    mask_chunks = [None if x is None else split(x) for x in (rule.segment_ids, rule.key_lengths)]
    out = jax.lax.map(lambda x: attend(x[0], x[1], x[2], keys_values), (q_chunks, *mask_chunks))
    out = jnp.moveaxis(out, 0, 2).reshape(len(q), -1, *q.shape[2:])
    return constrain(out[:, :length], *axes, "heads", "head_dim")
