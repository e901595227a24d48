"""Softmax attention by its definition (arXiv 1706.03762, eq. 1). All other implementations must equal it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.ops import cpu
from dreamllm_jax.ops.attention.masks import Mask, boolean_mask
from dreamllm_jax.sharding import platform

# The longest sum that XLA for GPUs computes in one kernel.
LONGEST_SUM = 2048


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
    elif platform() == "gpu" and (parts := _parts(q, k)) > 1:
        out = _one_query(q, k, v, visible, parts)
    else:
        out = jax.nn.dot_product_attention(q, k, v, mask=visible)
        out = checkpoint_name(out, "attention_output") if name_output else out
    if visible is None or mask is None or not mask.may_hide_all_keys():
        return out
    return jnp.where(visible.any(-1)[:, 0, :, None, None], out, 0)


def _parts(q: Array, k: Array) -> int:
    """Returns into how many equal parts the keys are split so that no sum over them is too long for a kernel.

    That concerns a single query whose heads have keys of their own: its products are sums to XLA.
    """
    keys = k.shape[1]
    if q.shape[1] > 1 or q.shape[2] != k.shape[2]:
        return 1
    least = -(-keys // LONGEST_SUM)
    return next((parts for parts in range(least, 2 * least) if keys % parts == 0), 1)


def _one_query(q: Array, k: Array, v: Array, visible: Array | None, parts: int) -> Array:
    """Returns attention from one query, with the sum over values in equal parts.

    XLA would write the weighted values of all keys to memory before it sums them.
    """
    scores = jnp.einsum("bnh,bsnh->bns", q[:, 0], k, preferred_element_type=jnp.float32)
    scores *= q.shape[-1] ** -0.5
    if visible is not None:
        scores = jnp.where(visible[:, :, 0], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores).astype(v.dtype).reshape(*scores.shape[:2], parts, -1)
    values = v.reshape(len(v), parts, -1, *v.shape[2:])
    sums = jnp.einsum("bnps,bpsnh->pbnh", shares, values, preferred_element_type=jnp.float32)
    return sums.sum(0).astype(q.dtype)[:, None]
