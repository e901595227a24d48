"""The key-value cache of a language model: one static array each of keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamllm_jax.config.towers import LlamaConfig

ENTRIES = 64  # what the number of entries is a multiple of, so that sums over them are split into equal parts


@flax.struct.dataclass
class KVCache:
    """The keys and values of all layers. Row b holds `lengths[b]` tokens; later entries are masked.

    A length greater than the capacity means that tokens were dropped because the capacity was too small. They
    are written to an entry after it, which is never read. Testing the index instead takes three more kernels
    per layer and token on GPUs. S is greater than the capacity, and a multiple of ENTRIES.
    Under dynamic rotary scaling the keys are stored unrotated, since their angles change as the row grows.
    The entries of a head are contiguous, as the products of attention read them, so that no new token causes
    a transposition.
    """

    k: Float[Array, "layers B K S H"]
    v: Float[Array, "layers B K S H"]
    lengths: Int[Array, "B"]
    capacity: int = flax.struct.field(pytree_node=False)  # the number of tokens that a row has room for

    def write(
        self, layer: int, k: Float[Array, "B L K H"], v: Float[Array, "B L K H"], entries: Int[Array, "B L"]
    ) -> KVCache:
        """Returns the cache with a layer's keys and values at `entries`, which must be below S."""
        if entries.size == 1:  # a scatter would read what it overwrites, in case the index is out of bounds
            begin = (layer, 0, 0, entries[0, 0], 0)
            new_k, new_v = (
                jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2)[None].astype(old.dtype), begin)
                for old, new in ((self.k, k), (self.v, v))
            )
        else:
            index = (layer, jnp.arange(len(k))[:, None], slice(None), entries)
            new_k, new_v = (
                old.at[index].set(new.astype(old.dtype), mode="promise_in_bounds")
                for old, new in ((self.k, k), (self.v, v))
            )
        return dataclasses.replace(self, k=new_k, v=new_v)

    def write_first(self, layer: int, k: Float[Array, "B L K H"], v: Float[Array, "B L K H"]) -> KVCache:
        """Returns the cache with a layer's keys and values at the first entries, as many as there is room."""
        n = min(k.shape[1], self.capacity)
        new_k, new_v = (
            old.at[layer, :, :, :n].set(jnp.swapaxes(new[:, :n], 1, 2).astype(old.dtype))
            for old, new in ((self.k, k), (self.v, v))
        )
        return dataclasses.replace(self, k=new_k, v=new_v)

    def read(self, layer: int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns all entries of a layer, also those without keys and values."""
        return jnp.swapaxes(self.k[layer], 1, 2), jnp.swapaxes(self.v[layer], 1, 2)


def init_cache(config: LlamaConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> KVCache:
    """Returns an empty cache of `batch` rows with room for `capacity` tokens each."""
    entries = -(-(capacity + 1) // ENTRIES) * ENTRIES
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, entries, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32), capacity)
