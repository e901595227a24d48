"""The forms for XLA's CPU backend against the definitions and the gradients that autodiff derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.ops import cpu
from dreamllm_jax.ops.attention import attention, masks
from dreamllm_jax.ops.attention.masks import Mask, boolean_mask
from dreamllm_jax.ops.conv import convolve
from dreamllm_jax.ops.linear import Dense, linear
from tests.ops.attention_inputs import IDS, KEY_IDS, random_qkv


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_has_the_gradients_that_autodiff_derives(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 5, 3), (3, 4), (2, 5, 4))
    x, kernel, pull = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    (ours, back), (theirs, other) = (jax.vjp(f, x, kernel) for f in (cpu.matmul, jnp.matmul))
    assert ours.dtype == dtype
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        assert mine.dtype == wanted.dtype
        # In bfloat16 the two forms may round their sums at different points.
        bounds = dict(rtol=1e-5, atol=1e-6) if dtype == jnp.float32 else dict(rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(*(y.astype(jnp.float32) for y in (mine, wanted)), **bounds)
    dense = Dense(4, dtype=dtype)
    applied = dense.apply({"params": {"kernel": kernel, "bias": jnp.ones(4)}}, x)
    np.testing.assert_array_equal(applied, ours + jnp.ones(4, dtype))


@pytest.mark.parametrize("width", [6, 5], ids=["two halves", "odd width"])
def test_one_row_is_multiplied_like_many(width):
    rng = np.random.default_rng(0)
    x, kernel, pull = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, width), (width, 4), (1, 1, 4))
    )
    (ours, back), (theirs, other) = (jax.vjp(f, x, kernel) for f in (linear, jnp.matmul))
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)
    assert ("f32[2,3,4]" in str(jax.make_jaxpr(linear)(x, kernel))) == (width == 6)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", [None, Mask(IDS, KEY_IDS)], ids=["none", "segments"])
def test_attention_has_the_gradients_that_autodiff_derives(kv_heads, mask):
    q, k, v = random_qkv(kv_heads=kv_heads)
    visible = boolean_mask(mask, 5, 7)
    pull = jax.random.normal(jax.random.key(1), q.shape)
    if visible is not None:
        pull *= visible.any(-1)[:, 0, :, None, None]

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=visible)

    def head_major(q, k, v):
        return cpu.head_major_attention(q, k, v, visible)

    (ours, back), (theirs, other) = (jax.vjp(f, q, k, v) for f in (head_major, plain))
    np.testing.assert_allclose(ours * (pull != 0), theirs * (pull != 0), atol=1e-6)
    for mine, wanted in zip(back(pull), other(pull), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [150, 1030], ids=["blocks", "the most blocks"])
def test_attention_skips_what_causality_hides_and_nothing_else(length):
    q, k, v = random_qkv(length=length, entries=length)
    ids = jnp.array([[1] * 70 + [2] * (length - 70), [1] * (length - 9) + [0] * 9])
    visible = boolean_mask(masks.packed(ids), length, length)
    pull = jax.random.normal(jax.random.key(1), q.shape) * (ids > 0)[:, :, None, None]

    def blocks(q, k, v):
        return cpu.head_major_attention(q, k, v, visible, causal=True) * (ids > 0)[:, :, None, None]

    def unblocked(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=visible) * (ids > 0)[:, :, None, None]

    products = str(jax.make_jaxpr(blocks)(q, k, v)).count("dot_general[")
    assert products == 2 * min(-(-length // 64), 8)
    (ours, back), (theirs, other) = (jax.vjp(f, q, k, v) for f in (blocks, unblocked))
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)


def test_other_platforms_use_the_definitions(monkeypatch):
    """For another platform the program has XLA's operations alone, without derivatives of our own."""
    x, kernel = jnp.ones((1, 4, 4, 6)), jnp.ones((3, 3, 6, 6))
    q, k, v = random_qkv(entries=5)

    def program(x, q, k, v):
        return convolve(x, kernel, 1, (1, 1)) @ kernel[0, 0], linear(x, kernel[0, 0]), attention(q, k, v)

    def own_derivatives():
        return str(jax.make_jaxpr(lambda *inputs: program(*inputs))(x, q, k, v)).count("custom_vjp_call")

    assert own_derivatives() == 3
    monkeypatch.setattr(cpu, "platform", lambda: "tpu")
    assert own_derivatives() == 0
