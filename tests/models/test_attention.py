"""Attention against its definition, and the masks entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.models.attention import attention, cache_mask, causal_segment_mask


def random_qkv(heads=4, kv_heads=2, length=5, entries=7):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, heads, 8), (2, entries, kv_heads, 8), (2, entries, kv_heads, 8)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def by_definition(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        kv = n // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(mask[b, n, i])
        if len(seen):
            weights = np.exp(k[b, seen, kv] @ q[b, i, n] / np.sqrt(q.shape[-1]))
            out[b, i, n] = weights @ v[b, seen, kv] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [0, 1, 4])
def test_attention_is_its_definition(kv_heads, mask_heads):
    q, k, v = random_qkv(kv_heads=kv_heads)
    mask = None
    if mask_heads:
        mask = jax.random.bernoulli(jax.random.key(1), 0.4, (2, mask_heads, 5, 7))
        mask = mask.at[0, :, 2].set(False)
    full = np.ones((2, 4, 5, 7), bool) if mask is None else np.broadcast_to(mask, (2, 4, 5, 7))
    np.testing.assert_allclose(attention(q, k, v, mask), by_definition(q, k, v, full), atol=1e-6)


def test_query_that_sees_nothing_is_zero_with_finite_gradients():
    q, k, v = random_qkv()
    mask = jnp.zeros((2, 1, 5, 7), bool)
    value, grads = jax.value_and_grad(lambda *x: attention(*x, mask).sum(), (0, 1, 2))(q, k, v)
    assert value == 0
    assert all((g == 0).all() for g in grads)


def test_attention_in_bfloat16_has_a_float32_softmax():
    q, k, v = random_qkv()
    rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = attention(*rounded)
    assert out.dtype == jnp.bfloat16
    expected = attention(*(x.astype(jnp.float32) for x in rounded))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


def test_causal_segment_mask():
    mask = causal_segment_mask(jnp.array([[1, 1, 2, 2, 0]]))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(mask[0, 0].astype(int), expected)


def test_cache_mask():
    positions, valid = jnp.array([[2, 3], [0, 0]]), jnp.array([[True, True], [True, False]])
    mask = cache_mask(positions, valid, 5)
    assert mask.shape == (2, 1, 2, 5)
    np.testing.assert_array_equal(mask.sum(-1)[:, 0], [[3, 4], [1, 0]])
    np.testing.assert_array_equal(mask[0, 0, 0], [True, True, True, False, False])
