"""Softmax attention by its definition (arXiv 1706.03762, eq. 1). All other implementations must equal it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.ops import cpu
from dreamllm_jax.ops.attention.masks import Mask, boolean_mask


def reference_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    name_output: bool = True,
) -> Float[Array, "B L N H"]:
    """Returns `softmax(q k^T / sqrt(H)) v`, with the softmax in float32.

    K divides N: each key head serves N // K neighbouring query heads (arXiv 2305.13245). A query whose keys
    are all masked gets zeros. All scores [B, N, L, S] are in memory at once, on TPUs in float32. With
    `name_output` the result is named "attention_output" for rematerialization.
    """
    visible = boolean_mask(mask, q.shape[1], k.shape[1])
    if cpu.is_target() and q.dtype == jnp.float32:
        causal = mask is not None and mask.causal
        out = cpu.head_major_attention(q, k, v, visible, causal, name_output)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=visible)
        out = checkpoint_name(out, "attention_output") if name_output else out
    if visible is None or mask is None or not mask.may_hide_all_keys():
        return out
    return jnp.where(visible.any(-1)[:, 0, :, None, None], out, 0)
