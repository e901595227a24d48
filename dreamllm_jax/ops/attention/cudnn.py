"""cuDNN's fused attention for GPUs, on a mesh of devices.

On an H200 with JAX 0.11.2, its distance from float32 was that of XLA's attention in bfloat16
(`python -m benchmarks.kernels --size=full`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.ops.attention.masks import Mask, boolean_mask
from dreamllm_jax.sharding import constrain


def cudnn_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    batch_axis: str = "batch",
) -> Float[Array, "B L N H"]:
    """Returns what `reference_attention` returns, to rounding, and so are its gradients.

    The kernel applies causality itself. Segments reach it as an array [B, 1, L, S] without heads, in the
    dtype of q. JAX lets XLA partition the kernel by rows (of the logical axis `batch_axis`) and by heads; a
    sharded length is gathered.
    """
    q = constrain(q, batch_axis, None, "heads", "head_dim")
    causal = mask is not None and mask.causal
    rest = None
    if mask is not None:
        rest = boolean_mask(dataclasses.replace(mask, causal=False), q.shape[1], k.shape[1])
    out = jax.nn.dot_product_attention(q, k, v, mask=rest, is_causal=causal, implementation="cudnn")
    if mask is None or mask.segment_ids is None:
        return out
    # In the kernel, a query whose keys are all masked attends to all of them.
    return jnp.where((mask.segment_ids > 0)[:, :, None, None], out, 0)


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
