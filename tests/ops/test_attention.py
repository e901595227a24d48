"""Attention against its definition, masks entry by entry, and the selection of an implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.ops.attention import attention, masks
from dreamllm_jax.ops.attention.masks import Mask, boolean_mask
from dreamllm_jax.ops.attention.selection import MIN_KERNEL_LENGTH, select_implementation
from tests.ops.attention_inputs import IDS, KEY_IDS, random_qkv


def by_definition(q, k, v, visible):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        kv = n // (q.shape[2] // k.shape[2])
        keys = np.flatnonzero(visible[b, i])
        if len(keys):
            weights = np.exp(k[b, keys, kv] @ q[b, i, n] / np.sqrt(q.shape[-1]))
            out[b, i, n] = weights @ v[b, keys, kv] / weights.sum()
    return out


LENGTHS = jnp.array([[1, 0, 7, 3, 2], [4, 4, 4, 0, 1]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [None, Mask(IDS, KEY_IDS), Mask(key_lengths=LENGTHS), Mask(IDS, KEY_IDS, LENGTHS)],
    ids=["none", "segments", "lengths", "both"],
)
def test_attention_is_its_definition(kv_heads, mask):
    q, k, v = random_qkv(kv_heads=kv_heads)
    visible = np.ones((2, 5, 7), bool)
    for b, i, j in np.ndindex(visible.shape):
        if mask is not None and mask.segment_ids is not None:
            visible[b, i, j] &= IDS[b, i] == KEY_IDS[b, j]
        if mask is not None and mask.key_lengths is not None:
            visible[b, i, j] &= j < LENGTHS[b, i]
    np.testing.assert_allclose(attention(q, k, v, mask), by_definition(q, k, v, visible), atol=1e-6)


def test_a_query_without_keys_is_zero_with_finite_gradients():
    q, k, v = random_qkv()
    mask = Mask(key_lengths=jnp.zeros((2, 1), jnp.int32))
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


def test_packed_mask():
    """The example of `masks.packed`."""
    visible = boolean_mask(masks.packed(jnp.array([[1, 1, 2, 2, 2, 0]])), 6, 6)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(visible[0, 0].astype(int), expected)


def test_cached_mask():
    """The example of `masks.cached`, and a second row."""
    positions = jnp.array([[2, 3, 3], [0, 0, 0]])
    valid = jnp.array([[True, True, False], [True, False, False]])
    visible = boolean_mask(masks.cached(positions, valid), 3, 6)
    assert visible.shape == (2, 1, 3, 6)
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(visible[0, 0].astype(int), expected)
    np.testing.assert_array_equal(visible[1, 0].sum(-1), [1, 0, 0])


def test_a_causal_mask_needs_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="5 queries and 7 keys"):
        attention(*random_qkv(), Mask(causal=True))


CAUSAL, LENGTHWISE = Mask(causal=True), Mask(key_lengths=jnp.ones((1, 1), jnp.int32))


@pytest.mark.parametrize(
    ("wanted", "queries", "keys", "mask", "platform", "runs"),
    [
        ("auto", 4096, 4096, None, "tpu", "xla"),  # no benchmark has yet shown a kernel to be faster
        ("auto", 4096, 4096, None, "a new platform", "xla"),
        ("splash", 2048, 2048, CAUSAL, "tpu", "splash"),
        ("splash", 4096, 64, None, "tpu", "xla"),  # dream queries as keys
        ("splash", 4096, 77, None, "cpu", "xla"),  # too short: the platform does not matter
        ("splash", 1, 2048, LENGTHWISE, "tpu", "xla"),  # a new token
        ("splash", MIN_KERNEL_LENGTH, 2048, LENGTHWISE, "tpu", "chunked"),  # a prompt
        ("chunked", MIN_KERNEL_LENGTH, MIN_KERNEL_LENGTH, None, "cpu", "chunked"),
        ("chunked", MIN_KERNEL_LENGTH, MIN_KERNEL_LENGTH - 1, None, "cpu", "xla"),
        ("cudnn", 2048, 2048, CAUSAL, "gpu", "cudnn"),
        ("auto", 2048, 2048, CAUSAL, "gpu", "cudnn"),
        ("auto", 4096, 64, None, "gpu", "cudnn"),  # dream queries as keys
        ("auto", 257, 257, None, "gpu", "cudnn"),  # a vision tower
        ("auto", 64, 2048, LENGTHWISE, "gpu", "cudnn"),  # dream queries on a cache
        ("auto", 65, 2048, LENGTHWISE, "gpu", "xla"),  # an odd number of queries with a mask
        ("cudnn", 513, 2048, LENGTHWISE, "gpu", "chunked"),
        ("auto", 1, 2048, LENGTHWISE, "gpu", "xla"),  # a new token
        ("lean", 2048, 2048, CAUSAL, "tpu", "splash"),
        ("lean", 2048, 2048, CAUSAL, "gpu", "cudnn"),
        ("lean", 2048, 2048, CAUSAL, "cpu", "chunked"),
    ],
)
def test_selection(wanted, queries, keys, mask, platform, runs):
    assert select_implementation(wanted, queries, keys, 128, jnp.bfloat16, mask, platform) == runs


@pytest.mark.parametrize(("wanted", "runs"), [("auto", "xla"), ("lean", "chunked")])
@pytest.mark.parametrize(("width", "dtype"), [(512, jnp.bfloat16), (64, jnp.float32)])
def test_what_cudnn_does_not_take(wanted, runs, width, dtype):
    assert select_implementation(wanted, 2048, 2048, width, dtype, CAUSAL, "gpu") == runs


@pytest.mark.parametrize(
    ("wanted", "width", "dtype", "platform", "sentence"),
    [
        ("splash", 128, jnp.bfloat16, "cpu", "a kernel for TPUs, but the program is for cpu: choose 'auto'"),
        ("cudnn", 128, jnp.bfloat16, "tpu", "a kernel for GPUs, but the program is for tpu"),
        ("cudnn", 512, jnp.bfloat16, "gpu", "with bfloat16 heads of width 512"),
        ("cudnn", 64, jnp.float32, "gpu", "with float32 heads of width 64"),
    ],
)
def test_unavailable_kernels_are_refused(wanted, width, dtype, platform, sentence):
    with pytest.raises(ValueError, match=sentence):
        select_implementation(wanted, 2048, 2048, width, dtype, None, platform)
