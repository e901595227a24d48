"""Small inputs of attention that several test files share."""

import jax
import jax.numpy as jnp

IDS = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
KEY_IDS = jnp.array([[2, 1, 1, 2, 0, 0, 2], [2, 3, 3, 1, 0, 1, 2]])


def random_qkv(heads=4, kv_heads=2, length=5, entries=7):
    """Two rows of queries [2, length, heads, 8], keys and values [2, entries, kv_heads, 8]."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, heads, 8), (2, entries, kv_heads, 8), (2, entries, kv_heads, 8)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
