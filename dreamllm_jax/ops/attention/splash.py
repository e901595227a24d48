"""TPU splash attention: a Pallas kernel that holds scores in blocks, on a mesh of devices.

The kernel is JAX's (`jax.experimental.pallas.ops.tpu.splash_attention`): flash attention (arXiv 2307.08691)
that skips blocks whose pairs are all masked. XLA cannot partition a kernel. Each device is therefore given
its rows, its heads and, where the length is sharded, its queries with all keys. (Under a causal mask, the
devices with the last queries then have the most work.)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.sharding import activation_spec, mesh_axes

LANES = 128  # the kernel takes lengths that are multiples of this


def splash_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    axes: tuple[str | None, str | None] = ("batch", "length"),
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Returns what `reference_attention` returns, to rounding, and so are its gradients.

    `mask` must satisfy `supports_mask`. `axes` are the logical axes of rows and queries. Lengths are padded
    to multiples of 128. What the backward pass needs is named "attention_output" (see `ops.scan`). With
    `interpret` the kernel runs on any device, slowly.
    """
    assert supports_mask(mask), f"{mask}: see selection.select_implementation"
    mesh = jax.sharding.get_abstract_mesh()
    q_spec = kv_spec = PartitionSpec(None, None, None, None)
    if not mesh.empty:
        q_spec = activation_spec((*axes, "heads", "head_dim"), q.shape, mesh)
        kv_spec = activation_spec((axes[0], None, "kv_heads", "head_dim"), k.shape, mesh)
    if q_spec[2] != kv_spec[2]:  # fewer key heads than devices: repeat them, one for each query head
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    parts = math.prod(mesh.shape[name] for name in mesh_axes(q_spec[1]))

    length, multiple = q.shape[1], parts * LANES
    ids = _segments(q, k, mask, multiple)
    # [B, N, L, H]. The kernel does not scale the scores, so the queries are scaled, and rounded.
    q = _padded((q * (q.shape[-1] ** -0.5)).astype(q.dtype), multiple).swapaxes(1, 2)
    k, v = (_padded(x, multiple).swapaxes(1, 2) for x in (k, v))
    causal = mask is not None and mask.causal
    kernel = _kernel(q, k, causal, parts, interpret)

    def run(kernel, q, k, v, ids):
        per_row = jax.vmap(kernel, (0, 0, 0, None if ids is None else 0))
        return per_row(q, k, v, ids)

    if not mesh.empty and mesh.size > 1:
        rows, queries, heads, _ = q_spec
        of_queries, of_keys = PartitionSpec(rows, heads, queries), PartitionSpec(rows, heads)
        specs: Any = (PartitionSpec(rows, queries), PartitionSpec(rows))
        segment_specs = pallas.SegmentIds(*specs)
        run = jax.shard_map(
            run,
            in_specs=(
                kernel.manual_sharding_spec(
                    NamedSharding(mesh, PartitionSpec(None, queries if causal else None))
                ),
                of_queries,
                of_keys,
                of_keys,
                None if ids is None else segment_specs,
            ),
            out_specs=of_queries,
            check_vma=False,
        )
    return run(kernel, q, k, v, ids).swapaxes(1, 2)[:, :length]


def supports_mask(mask: Mask | None) -> bool:
    """Returns whether the kernel can apply the mask: causality, and segments that queries and keys share."""
    return mask is None or (mask.key_segment_ids is None and mask.key_lengths is None)


def _padded(x: Array, multiple: int, value: int = 0) -> Array:
    """Returns [B, L, ...] padded to a length that `multiple` divides."""
    sizes = ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, sizes, constant_values=value)


def _segments(q: Array, k: Array, mask: Mask | None, multiple: int) -> pallas.SegmentIds | None:
    """Returns the kernel's segments: the mask's, or some that hide padding; None where neither is needed."""
    if mask is not None and mask.segment_ids is not None:
        ids: Int[Array, "B L"] = _padded(mask.segment_ids, multiple, -1)
        return pallas.SegmentIds(ids, ids)
    if (mask is not None and mask.causal) or k.shape[1] % multiple == 0:
        return None  # nothing is padded, or causality hides the padding
    queries = q.shape[1] + -q.shape[1] % multiple
    # Padded queries attend to the real keys, so that every query has a key. Their results are cut off.
    return pallas.SegmentIds(
        jnp.ones((len(q), queries), jnp.int32), _padded(jnp.ones(k.shape[:2], jnp.int32), multiple)
    )


def _kernel(q: Array, k: Array, causal: bool, parts: int, interpret: bool) -> Any:
    """Returns the kernel for queries [B, N, L, H], split into `parts` along L, and keys [B, K, S, H]."""
    length, keys = q.shape[2] // parts, k.shape[2]
    # A causal mask depends on the position of the part. Without one all parts are alike, and the kernel is
    # that of one part: the library cannot split a mask that hides nothing.
    head_mask = (
        pallas.CausalMask((q.shape[2], keys), shard_count=parts)
        if causal
        else pallas.FullMask((length, keys))
    )
    rows, columns = block_size(length), block_size(keys)
    blocks = pallas.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([head_mask] * q.shape[1]),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        residual_checkpoint_name="attention_output",
        interpret=interpret,
    )


@functools.cache
def block_size(length: int) -> int:
    """Returns the largest of 512, 256 and 128 that divides `length`: larger blocks reuse more."""
    return next(size for size in (512, 256, LANES) if length % size == 0)
