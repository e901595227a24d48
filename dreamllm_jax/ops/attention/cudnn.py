"""cuDNN's fused attention for GPUs, on a mesh of devices.

On an H200 with JAX 0.11.2, its distance from float32 was that of XLA's attention in bfloat16
(`python -m benchmarks.kernels --size=full`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # JAX has no public name for packed rows
from jaxtyping import Array, Float, Int

from dreamllm_jax.ops.attention.masks import Mask, boolean_mask
from dreamllm_jax.sharding import constrain

# Older versions of JAX compute the offsets of keys with the number of query heads.
_GROUPED_PACKED_ROWS = (0, 11, 1)


def cudnn_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    batch_axis: str = "batch",
) -> Float[Array, "B L N H"]:
    """Returns what `reference_attention` returns, to rounding, and so are its gradients.

    The kernel applies causality itself, and the segments of packed rows if it knows their lengths (see
    `supports_packed_rows`). Any other mask reaches it as an array [B, 1, L, S] without heads, in the dtype of
    q. JAX lets XLA partition the kernel by rows (of the logical axis `batch_axis`) and by heads; a sharded
    length is gathered.
    """
    q = constrain(q, batch_axis, None, "heads", "head_dim")
    if mask is not None and supports_packed_rows(mask, q.shape[2], k.shape[2]):
        assert mask.segment_lengths is not None
        return _packed_rows(q, k, v, mask.segment_lengths, batch_axis)
    causal = mask is not None and mask.causal
    rest = None
    if mask is not None:
        rest = boolean_mask(dataclasses.replace(mask, causal=False), q.shape[1], k.shape[1])
    out = jax.nn.dot_product_attention(q, k, v, mask=rest, is_causal=causal, implementation="cudnn")
    if rest is None or mask is None or not mask.may_hide_all_keys():
        return out
    # In the kernel, a query whose keys are all masked attends to all of them.
    return jnp.where(rest.any(-1)[:, 0, :, None, None], out, 0)


def _packed_rows(q: Array, k: Array, v: Array, lengths: Int[Array, "B M"], batch_axis: str) -> Array:
    """Returns causal attention within segments that lie one after another; padding is one more segment.

    Every position belongs to a segment, so that the kernel leaves no result and no gradient undefined.
    """
    padding = q.shape[1] - lengths.sum(axis=1, keepdims=True)
    lengths = jnp.concatenate([lengths, padding], axis=1)
    exists = lengths > 0
    starts = jnp.where(exists, jnp.cumsum(lengths, axis=1) - lengths, -1)
    # [B, M + 1] and [B, M + 2]. Unused entries are -1; the last offset is never read.
    lengths = constrain(jnp.where(exists, lengths, -1).astype(jnp.int32), batch_axis, None)
    offsets = jnp.pad(starts.astype(jnp.int32), ((0, 0), (0, 1)), constant_values=-1)
    offsets = constrain(offsets, batch_axis, None)
    out: Any = fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
    )
    return out


def supports_heads(dtype: Any, head_dim: int) -> bool:
    """Returns whether the kernel takes heads of this dtype and width: 16-bit floats, multiples of 8."""
    return jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128


def supports_lengths(queries: int, keys: int, mask: Mask | None) -> bool:
    """Returns whether the kernel takes this many queries and keys under a mask.

    With a mask as an array, whose gradient the backward pass writes, both numbers must be even. A single
    query, which only reads keys and values, is left to XLA.
    """
    if queries == 1:
        return False
    rules = () if mask is None else (mask.segment_ids, mask.key_segment_ids, mask.key_lengths)
    return all(rule is None for rule in rules) or (queries % 2 == 0 and keys % 2 == 0)


def supports_packed_rows(mask: Mask, heads: int, kv_heads: int) -> bool:
    """Returns whether the kernel takes segments by their lengths: on Hopper and newer GPUs, causal ones."""
    known = mask.causal and mask.segment_lengths is not None and mask.segment_ids is not None
    others = mask.key_segment_ids is None and mask.key_lengths is None
    grouped = heads == kv_heads or jax.__version_info__ >= _GROUPED_PACKED_ROWS
    return known and others and grouped and fused.check_compute_capability("9.0")
