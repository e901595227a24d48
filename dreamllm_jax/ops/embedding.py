"""Embedding tables: Flax's `Embed`, and the lookup in a table that is sharded over a mesh."""

from __future__ import annotations

import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dreamllm_jax.sharding import activation_spec, mesh_axes


@typing.no_type_check  # beartype cannot check Flax's annotation of `promote_dtype`
class Embed(nn.Embed):
    """`flax.linen.Embed`: rows of `embedding` [number, features] by id, initialized from N(0, 0.02^2)."""

    dtype: Any = jnp.float32
    embedding_init: Any = nn.initializers.normal(0.02)


def embedding_lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B L"], gathered: bool = False
) -> Float[Array, "B L D"]:
    """Returns the table's rows at token ids; an id outside the vocabulary gives NaN.

    On a mesh each device looks up its own tokens. The table is all-gathered along fsdp first, unless the
    caller says that it is `gathered` already: this moves less data than the embeddings would. Along tensor,
    where the vocabulary is split, each device looks up the ids of its own part, and the results are summed.
    The gradient of a device's own tokens is reduce-scattered along fsdp. (XLA for TPUs may turn that into an
    all-reduce of which each device keeps a part.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jnp.take(table, tokens, axis=0)
    rows = activation_spec(("batch", "length", None), (*tokens.shape, 0), mesh)
    split = activation_spec(("vocab", None), table.shape, mesh)[0]
    # If fsdp does not split the rows, devices with the same rows would each gather: leave it to the
    # partitioner.
    sliced = not gathered and "fsdp" in mesh_axes(rows[0]) and table.shape[1] % mesh.shape["fsdp"] == 0

    def local(table: Array, tokens: Array) -> Array:
        if sliced:
            table = jax.lax.all_gather(table, "fsdp", axis=1, tiled=True)
        if split is None:
            return jnp.take(table, tokens, axis=0)
        tokens = tokens - len(table) * jax.lax.axis_index("tensor")
        here = (tokens >= 0) & (tokens < len(table))
        found = jnp.take(table, jnp.where(here, tokens, 0), axis=0)
        found = jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")
        known = jax.lax.psum(here.astype(jnp.int32), "tensor") > 0
        return jnp.where(known[..., None], found, jnp.nan)

    in_specs = (PartitionSpec(split, "fsdp" if sliced else None), PartitionSpec(*rows[:2]))
    return jax.shard_map(local, in_specs=in_specs, out_specs=rows)(table, tokens)
