"""TPU splash attention: the Pallas kernel that holds scores in blocks, on a mesh of devices.

The kernel is JAX's (`jax.experimental.pallas.ops.tpu.splash_attention`; flash attention, arXiv 2307.08691,
that leaves out blocks in which nobody sees anybody). XLA cannot split a kernel, so that each device is
given its rows, its heads and, where the length is split, its queries with all keys. (Under a causal mask the
devices with the last queries then have the most to do.)
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dreamllm_jax.models.attention.masks import Mask
from dreamllm_jax.sharding import activation_spec, mesh_axes

LANES = 128  # lengths are multiples of it


def splash(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask | None = None,
    axes: tuple[str | None, str | None] = ("batch", "length"),
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """What `reference` returns, to rounding; its gradients too. For the mask, see `supports`.

    `axes` are the logical axes of rows and queries. Lengths are padded to multiples of 128. What the
    backward pass needs is named "attended" (see `layers.remat`). `interpret`: on any device, slowly.
    """
    assert supports(mask), f"{mask}: see choice.chosen"
    mesh = jax.sharding.get_abstract_mesh()
    names = (*axes, "heads", "head_dim"), (axes[0], None, "kv_heads", "head_dim")
    to = PartitionSpec(None, None, None, None), PartitionSpec(None, None, None, None)
    if not mesh.empty:
        to = activation_spec(names[0], q.shape, mesh), activation_spec(names[1], k.shape, mesh)
    if to[0][2] != to[1][2]:  # fewer key heads than devices: each query head gets its own
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        to = to[0], PartitionSpec(to[0][0], None, *to[0][2:])
    parts = math.prod(mesh.shape[name] for name in mesh_axes(to[0][1]))

    length, multiple = q.shape[1], parts * LANES
    ids = _segments(q, k, mask, multiple)
    # [B, N, L, H]. The kernel does not scale: the queries are, and rounded.
    q = _padded((q * (q.shape[-1] ** -0.5)).astype(q.dtype), multiple).swapaxes(1, 2)
    k, v = (_padded(x, multiple).swapaxes(1, 2) for x in (k, v))
    causal = mask is not None and mask.causal
    kernel = _kernel(q, k, causal, parts, interpret)

    def run(kernel, q, k, v, ids):
        each = jax.vmap(kernel, (0, 0, 0, None if ids is None else 0))
        return each(q, k, v, ids)

    if not mesh.empty and mesh.size > 1:
        rows, queries, heads, _ = to[0]
        split, whole = PartitionSpec(rows, heads, queries), PartitionSpec(rows, heads)
        run = jax.shard_map(
            run,
            in_specs=(
                kernel.manual_sharding_spec(
                    NamedSharding(mesh, PartitionSpec(None, queries if causal else None))
                ),
                split,
                whole,
                whole,
                None if ids is None else pallas.SegmentIds(PartitionSpec(rows, queries), PartitionSpec(rows)),
            ),
            out_specs=split,
            check_vma=False,
        )
    out = run(kernel, q, k, v, ids).swapaxes(1, 2)[:, :length]
    if mask is None or mask.segment_ids is None:
        return out
    # To the kernel padding is a segment like others.
    return jnp.where((mask.segment_ids > 0)[:, :, None, None], out, 0)


def supports(mask: Mask | None) -> bool:
    """Whether the kernel can follow the rule: causal, and segments that queries and keys share."""
    return mask is None or (mask.key_segment_ids is None and mask.key_lengths is None)


def _padded(x: Array, multiple: int) -> Array:
    """[B, L, ...] with zeros up to a length that `multiple` divides."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


def _segments(q: Array, k: Array, mask: Mask | None, multiple: int) -> pallas.SegmentIds | None:
    """The segments that hide keys: the mask's, or those that hide padding; None where nothing is hidden."""
    if mask is not None and mask.segment_ids is not None:
        ids: Int[Array, "B L"] = _padded(mask.segment_ids, multiple)
        return pallas.SegmentIds(ids, ids)
    if (mask is not None and mask.causal) or k.shape[1] % multiple == 0:
        return None  # what is padded stands behind all queries, or there is none
    queries = q.shape[1] + -q.shape[1] % multiple
    # Padded queries see the real keys, so that none is blind, and are cut off.
    return pallas.SegmentIds(
        jnp.ones((len(q), queries), jnp.int32), _padded(jnp.ones(k.shape[:2], jnp.int32), multiple)
    )


def _kernel(q: Array, k: Array, causal: bool, parts: int, interpret: bool) -> pallas.SplashAttentionKernel:
    """The kernel for queries [B, N, L, H] in `parts` along their length, and keys [B, K, S, H]."""
    length, keys = q.shape[2] // parts, k.shape[2]
    # Causality depends on where a part stands. Without it all parts are alike, and the kernel is one part's:
    # the library cannot divide a mask in which nothing is hidden.
    one = (
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
        pallas.MultiHeadMask([one] * q.shape[1]),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )


@functools.cache
def block_size(length: int) -> int:
    """The largest of 512, 256 and 128 that divides a length: large blocks reuse what they have loaded."""
    return next(size for size in (512, 256, LANES) if length % size == 0)
