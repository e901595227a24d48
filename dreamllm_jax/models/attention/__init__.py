"""Softmax attention, of which there are several implementations with the same masks and the same results.

    xla      the reference: the scores of all queries and keys are in memory
    chunked  the reference on 256 queries at a time
    splash   a Pallas kernel for TPUs
    cudnn    a kernel for GPUs

Which one runs is said by the config (`model.attention`) and `choice.chosen`. Not among them: tokamax, whose
0.0.17 needs Python 3.12 and JAX 0.11.1, newer than the oldest that this project runs on.
"""

from __future__ import annotations

from typing import Literal

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.models.attention.choice import chosen
from dreamllm_jax.models.attention.chunked import chunked
from dreamllm_jax.models.attention.cudnn import cudnn
from dreamllm_jax.models.attention.masks import Mask
from dreamllm_jax.models.attention.reference import reference
from dreamllm_jax.models.attention.splash import splash
from dreamllm_jax.sharding import platform

# The logical axes of rows and queries: rows of text may be split along their length, pictures are whole.
AXES = {"batch": ("batch", "length"), "pictures": ("pictures", None)}


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    *,
    implementation: AttentionKernel = "auto",
    rows: Literal["batch", "pictures"] = "batch",
) -> Float[Array, "B L N H"]:
    """`softmax(q k^T / sqrt(H)) v`, the softmax in float32; a query that sees nothing yields zeros.

    K divides N: each key head serves N // K neighbouring query heads. `rows` says how the rows are spread
    over the mesh. The result is named "attended" for rematerialization (see `layers.remat`).

    Raises:
      ValueError: an implementation that cannot run here (see `choice.chosen`).
    """
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    name = chosen(implementation, q.shape[1], k.shape[1], q.shape[-1], q.dtype, mask, platform())
    if name == "splash":
        return splash(q, k, v, mask, AXES[rows])  # it names what its backward pass needs
    if name == "xla":
        return reference(q, k, v, mask)  # as does this
    out = cudnn(q, k, v, mask, rows) if name == "cudnn" else chunked(q, k, v, mask, AXES[rows])
    return checkpoint_name(out, "attended")
