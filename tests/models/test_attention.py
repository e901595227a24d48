"""Attention against its definition, and the masks entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.models.attention import attention, masks
from dreamllm_jax.models.attention.by_heads import by_heads
from dreamllm_jax.models.attention.choice import LONG, chosen
from dreamllm_jax.models.attention.masks import Mask, table


def random_qkv(heads=4, kv_heads=2, length=5, entries=7):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, heads, 8), (2, entries, kv_heads, 8), (2, entries, kv_heads, 8)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def by_definition(q, k, v, seen):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, i in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        kv = n // (q.shape[2] // k.shape[2])
        keys = np.flatnonzero(seen[b, i])
        if len(keys):
            weights = np.exp(k[b, keys, kv] @ q[b, i, n] / np.sqrt(q.shape[-1]))
            out[b, i, n] = weights @ v[b, keys, kv] / weights.sum()
    return out


IDS = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]])
THEIR_IDS = jnp.array([[2, 1, 1, 2, 0, 0, 2], [2, 3, 3, 1, 0, 1, 2]])
LENGTHS = jnp.array([[1, 0, 7, 3, 2], [4, 4, 4, 0, 1]])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [None, Mask(IDS, THEIR_IDS), Mask(key_lengths=LENGTHS), Mask(IDS, THEIR_IDS, LENGTHS)],
    ids=["none", "segments", "lengths", "both"],
)
def test_attention_is_its_definition(kv_heads, mask):
    q, k, v = random_qkv(kv_heads=kv_heads)
    seen = np.ones((2, 5, 7), bool)
    for b, i, j in np.ndindex(seen.shape):
        if mask is not None and mask.segment_ids is not None:
            seen[b, i, j] &= IDS[b, i] == THEIR_IDS[b, j] and IDS[b, i] > 0
        if mask is not None and mask.key_lengths is not None:
            seen[b, i, j] &= j < LENGTHS[b, i]
    np.testing.assert_allclose(attention(q, k, v, mask), by_definition(q, k, v, seen), atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", [None, Mask(IDS, THEIR_IDS)], ids=["none", "segments"])
def test_the_form_for_cpu_has_the_gradients_that_autodiff_derives(kv_heads, mask):
    q, k, v = random_qkv(kv_heads=kv_heads)
    seen = table(mask, 5, 7)
    pull = jax.random.normal(jax.random.key(1), q.shape)
    if seen is not None:
        pull *= seen.any(-1)[:, 0, :, None, None]

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=seen)

    (ours, back), (theirs, other) = (jax.vjp(f, q, k, v) for f in (lambda *x: by_heads(*x, seen), plain))
    np.testing.assert_allclose(ours * (pull != 0), theirs * (pull != 0), atol=1e-6)
    for mine, wanted in zip(back(pull), other(pull), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [150, 1030], ids=["blocks", "as many blocks as there may be"])
def test_the_form_for_cpu_skips_what_causality_hides_and_nothing_else(length):
    q, k, v = random_qkv(length=length, entries=length)
    ids = jnp.array([[1] * 70 + [2] * (length - 70), [1] * (length - 9) + [0] * 9])
    seen = table(masks.packed(ids), length, length)
    pull = jax.random.normal(jax.random.key(1), q.shape) * (ids > 0)[:, :, None, None]

    def blocks(q, k, v):
        return by_heads(q, k, v, seen, causal=True) * (ids > 0)[:, :, None, None]

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=seen) * (ids > 0)[:, :, None, None]

    products = str(jax.make_jaxpr(blocks)(q, k, v)).count("dot_general[")
    assert products == 2 * min(-(-length // 64), 8)
    (ours, back), (theirs, other) = (jax.vjp(f, q, k, v) for f in (blocks, whole))
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)


def test_query_that_sees_nothing_is_zero_with_finite_gradients():
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


def test_packed_rows():
    seen = table(masks.packed(jnp.array([[1, 1, 2, 2, 0]])), 5, 5)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(seen[0, 0].astype(int), expected)


def test_cache():
    positions, valid = jnp.array([[2, 3], [0, 0]]), jnp.array([[True, True], [True, False]])
    seen = table(masks.cached(positions, valid), 2, 5)
    assert seen.shape == (2, 1, 2, 5)
    np.testing.assert_array_equal(seen.sum(-1)[:, 0], [[3, 4], [1, 0]])
    np.testing.assert_array_equal(seen[0, 0, 0], [True, True, True, False, False])


def test_a_causal_mask_needs_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="5 queries and 7 keys"):
        attention(*random_qkv(), Mask(causal=True))


CAUSAL, LENGTHWISE = Mask(causal=True), Mask(key_lengths=jnp.ones((1, 1), jnp.int32))


@pytest.mark.parametrize(
    ("wanted", "queries", "keys", "mask", "platform", "runs"),
    [
        ("auto", 4096, 4096, None, "tpu", "xla"),  # no benchmark has shown a kernel to be faster yet
        ("auto", 4096, 4096, None, "a new platform", "xla"),
        ("splash", 2048, 2048, CAUSAL, "tpu", "splash"),
        ("splash", 4096, 64, None, "tpu", "xla"),  # dream queries as keys
        ("splash", 4096, 77, None, "cpu", "xla"),  # nothing that a CPU has not
        ("splash", 1, 2048, LENGTHWISE, "tpu", "xla"),  # a new token
        ("splash", LONG, 2048, LENGTHWISE, "tpu", "chunked"),  # a prompt
        ("chunked", LONG, LONG, None, "cpu", "chunked"),
        ("chunked", LONG, LONG - 1, None, "cpu", "xla"),
        ("cudnn", 2048, 2048, CAUSAL, "gpu", "cudnn"),
        ("lean", 2048, 2048, CAUSAL, "tpu", "splash"),
        ("lean", 2048, 2048, CAUSAL, "gpu", "chunked"),
    ],
)
def test_choice(wanted, queries, keys, mask, platform, runs):
    assert chosen(wanted, queries, keys, 128, jnp.bfloat16, mask, platform) == runs


@pytest.mark.parametrize(
    ("wanted", "width", "dtype", "platform", "sentence"),
    [
        ("splash", 128, jnp.bfloat16, "cpu", "a kernel of tpus; the program is for cpu: choose 'auto'"),
        ("cudnn", 128, jnp.bfloat16, "tpu", "a kernel of gpus; the program is for tpu"),
        ("cudnn", 512, jnp.bfloat16, "gpu", "with heads of 512 bfloat16s"),
        ("cudnn", 64, jnp.float32, "gpu", "with heads of 64 float32s"),
    ],
)
def test_impossible_choice(wanted, width, dtype, platform, sentence):
    with pytest.raises(ValueError, match=sentence):
        chosen(wanted, 2048, 2048, width, dtype, None, platform)
