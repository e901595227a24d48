"""Softmax attention: one function with one kind of mask, and several implementations with the same results.

    xla      the reference, which holds the scores of all queries and keys in memory
    chunked  the reference for 256 queries at a time
    splash   a Pallas kernel for TPUs
    cudnn    a kernel for GPUs

The config (`model.attention`) and `selection.select_implementation` decide which one runs. tokamax is not
among them: its version 0.0.17 requires Python 3.12 and JAX 0.11.1, and this project supports older ones.
"""

from __future__ import annotations

from typing import Literal

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.ops.attention.chunked import chunked_attention
from dreamllm_jax.ops.attention.cudnn import cudnn_attention
from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.attention.reference import reference_attention
from dreamllm_jax.ops.attention.selection import select_implementation
from dreamllm_jax.ops.attention.splash import splash_attention
from dreamllm_jax.sharding import platform

# The logical axes of rows and queries. The length of text rows may be sharded, that of images is not.
AXES = {"batch": ("batch", "length"), "pictures": ("pictures", None)}


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    *,
    implementation: AttentionKernel = "auto",
    batch_axis: Literal["batch", "pictures"] = "batch",
) -> Float[Array, "B L N H"]:
    """Returns `softmax(q k^T / sqrt(H)) v` (arXiv 1706.03762), with the softmax in float32.

    K divides N: each key head serves N // K neighbouring query heads (arXiv 2305.13245). A query whose keys
    are all masked gets zeros. `batch_axis` is the logical axis of the rows (see `sharding`). The result is
    named "attention_output" for rematerialization, except cuDNN's, which is known by its primitive (see
    `ops.scan`).

    Raises:
      ValueError: the implementation cannot run here (see `selection.select_implementation`).
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    name = select_implementation(
        implementation, q.shape[1], k.shape[1], q.shape[-1], q.dtype, mask, platform()
    )
    # splash and the reference name their own output, since their backward passes use more than it. What cuDNN
    # returns is known by the primitive (see `ops.scan`).
    if name == "splash":
        return splash_attention(q, k, v, mask, AXES[batch_axis])
    if name == "xla":
        return reference_attention(q, k, v, mask)
    if name == "cudnn":
        return cudnn_attention(q, k, v, mask, batch_axis)
    return checkpoint_name(chunked_attention(q, k, v, mask, AXES[batch_axis]), "attention_output")
