"""The reference on some queries at a time: all scores are never in memory together (arXiv 2112.05682)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.models.attention.masks import Mask
from dreamllm_jax.models.attention.reference import reference
from dreamllm_jax.sharding import constrain

# Enough to keep a matrix unit busy; scores of 4,096 keys take 4 MiB a head.
QUERIES = 256


def chunked(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    axes: tuple[str | None, str | None] = ("batch", "length"),
    queries: int = QUERIES,
) -> Float[Array, "B L N H"]:
    """What `reference` returns, at most `queries` queries at a time; the backward pass computes scores again.

    `axes` are the logical axes of rows and queries. Chunk j takes queries j, j + n, j + 2n, ...: where the
    length is split over devices, each keeps its own.
    """
    length = q.shape[1]
    number = -(-length // queries)
    if number == 1:
        return reference(q, k, v, mask)
    padding = -length % number

    def split(x: Array) -> Array:
        """[#B, L, ...] -> [n, #B, L / n, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, number, *x.shape[2:]), 2, 0)

    rule = Mask() if mask is None else mask.row_by_row(length)
    if rule.key_lengths is not None and rule.key_lengths.shape[1] == 1:
        rule = rule.replace(key_lengths=jnp.broadcast_to(rule.key_lengths, (len(rule.key_lengths), length)))
    # The gradients of keys and values are added up over the chunks: in float32.
    wide = [x.astype(jnp.float32) for x in (k, v)]

    @jax.checkpoint
    def some(q: Array, ids: Array | None, lengths: Array | None, wide: list[Array]) -> Array:
        part = Mask(ids, rule.key_segment_ids, lengths)
        return reference(q, *(x.astype(q.dtype) for x in wide), part, named=False)

    chunks = constrain(split(q), None, *axes, "heads", "head_dim")
    rules = [None if x is None else split(x) for x in (rule.segment_ids, rule.key_lengths)]
    out = jax.lax.map(lambda x: some(*x, wide), (chunks, *rules))
    out = jnp.moveaxis(out, 0, 2).reshape(len(q), -1, *q.shape[2:])
    return constrain(out[:, :length], *axes, "heads", "head_dim")
