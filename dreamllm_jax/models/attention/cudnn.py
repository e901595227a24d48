"""cuDNN's fused attention on GPUs, on a mesh of devices.

Written without a GPU at hand: `python -m benchmarks.kernels --size=full` on one says whether it is right.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dreamllm_jax.models.attention.masks import Mask, table
from dreamllm_jax.sharding import constrain


def cudnn(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    rows: str = "batch",
) -> Float[Array, "B L N H"]:
    """What `reference` returns, to rounding; its gradients too.

    Causality is the kernel's own; segments reach it as a table [B, 1, L, S], without heads, in the type of q.
    JAX lets XLA split it by rows (of the logical axis `rows`) and heads; a split length is gathered.
    """
    q = constrain(q, rows, None, "heads", "head_dim")
    causal = mask is not None and mask.causal
    rest = None if mask is None else table(mask.replace(causal=False), q.shape[1], k.shape[1])
    out = jax.nn.dot_product_attention(q, k, v, mask=rest, is_causal=causal, implementation="cudnn")
    if mask is None or mask.segment_ids is None:
        return out
    # To the kernel a query that sees nothing sees everything.
    return jnp.where((mask.segment_ids > 0)[:, :, None, None], out, 0)
