"""Softmax attention and the masks of packed rows and of the cache (arXiv 1706.03762, eq. 1).

A mask is boolean, true where a query may look, and shaped [B, 1, L, S] so that it broadcasts over
heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #N #L S"] | None = None,
) -> Float[Array, "B L N H"]:
    """`softmax(q k^T / sqrt(H)) v`, the softmax in float32; a query that sees nothing yields zeros.

    K divides N: each key head serves N // K neighbouring query heads (arXiv 2305.13245).
    """
    out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)
    if mask is None:
        return out
    sees = jnp.swapaxes(mask.any(-1), 1, 2)  # [B, L, 1 or N]
    return jnp.where(sees[..., None], out, 0)


def causal_segment_mask(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    """Each position sees itself and what stands before it in its own segment; padding (0) sees nothing."""
    row = jnp.arange(segment_ids.shape[1])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = segment_ids[:, :, None] > 0
    return (same & real & (row[:, None] >= row))[:, None]


def cache_mask(
    positions: Int[Array, "B L"], valid: Bool[Array, "B L"], capacity: int
) -> Bool[Array, "B 1 L {capacity}"]:
    """A valid token at position p sees the cache's entries 0 to p; an invalid one sees nothing."""
    seen = jnp.arange(capacity) <= positions[..., None]
    return (seen & valid[..., None])[:, None]
