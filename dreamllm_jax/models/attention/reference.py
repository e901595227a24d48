"""Softmax attention by its definition (arXiv 1706.03762, eq. 1): what all others must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.models.attention.by_heads import by_heads
from dreamllm_jax.models.attention.masks import Mask, table
from dreamllm_jax.sharding import platform


def reference(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    named: bool = True,
) -> Float[Array, "B L N H"]:
    """`softmax(q k^T / sqrt(H)) v`, the softmax in float32; a query that sees nothing yields zeros.

    K divides N: each key head serves N // K neighbouring query heads (arXiv 2305.13245). The scores
    [B, N, L, S] are whole in memory, on TPU in float32. What comes of them is `named` "attended".
    """
    seen = table(mask, q.shape[1], k.shape[1])
    if platform() == "cpu" and q.dtype == jnp.float32:
        out = by_heads(q, k, v, seen, mask is not None and mask.causal, named)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=seen)
        out = checkpoint_name(out, "attended") if named else out
    if seen is None or mask is None or not mask.blinds():
        return out
    return jnp.where(seen.any(-1)[:, 0, :, None, None], out, 0)
