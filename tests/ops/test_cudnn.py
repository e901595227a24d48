"""What cuDNN's attention is given, with XLA's in its place: the kernel itself runs only on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.ops.attention import cudnn, masks
from dreamllm_jax.ops.attention.cudnn import cudnn_attention, supports_packed_rows
from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.attention.reference import reference_attention
from tests.ops.test_attention_kernels import MASKS, random_qkv, results

LENGTH = 64
# Rows with padding, without it, of one document, and of padding alone.
SEGMENTS = jnp.array([[10, 1, 30, 0, 0], [20, 20, 20, 3, 1], [64, 0, 0, 0, 0], [0, 0, 0, 0, 0]], jnp.int32)


def ids_of(lengths):
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, LENGTH - len(row))) for row in rows], jnp.int32)


def assert_equal_results(mask, qkv):
    ours, expected = (results(function, *qkv, mask) for function in (cudnn_attention, reference_attention))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_as_arrays(mask, monkeypatch):
    attend, requested = jax.nn.dot_product_attention, []

    def xla_instead(*args, implementation, **options):
        requested.append(implementation)
        return attend(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", xla_instead)
    assert_equal_results(MASKS[mask](LENGTH), random_qkv(2, LENGTH, LENGTH))
    assert requested == ["cudnn"]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which the kernel does what JAX documents. What no segment covers is undefined, here NaN."""

    def packed(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert mask_type.name == "PADDING_CAUSAL"
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets
        assert q_offsets.shape == (len(q), q_seqlen.shape[1] + 1)
        assert {q_seqlen.dtype, q_offsets.dtype} == {jnp.dtype("int32")}
        positions, starts = jnp.arange(q.shape[1]), q_offsets[:, :-1, None]
        within = (
            (q_seqlen[..., None] >= 0) & (positions >= starts) & (positions < starts + q_seqlen[..., None])
        )
        same = jnp.einsum("bml,bms->bls", within, within, preferred_element_type=jnp.int32) > 0
        visible = (same & (positions[:, None] >= positions))[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale)
        return jnp.where(within.any(1)[:, :, None, None], out, jnp.nan)

    monkeypatch.setattr(cudnn.fused, "dot_product_attention", packed)
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: capability == "9.0")


@pytest.mark.usefixtures("hopper")
def test_packed_rows_by_their_lengths():
    mask = masks.packed(ids_of(np.asarray(SEGMENTS)), SEGMENTS)
    assert_equal_results(mask, random_qkv(4, LENGTH, LENGTH, kv_heads=4))


@pytest.mark.usefixtures("hopper")
def test_packed_rows_with_fewer_key_heads(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    mask = masks.packed(ids_of(np.asarray(SEGMENTS)), SEGMENTS)
    assert supports_packed_rows(mask, 4, 2)
    assert_equal_results(mask, random_qkv(4, LENGTH, LENGTH, kv_heads=2))
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))  # computes other offsets for keys
    assert supports_packed_rows(mask, 4, 4) and not supports_packed_rows(mask, 4, 2)


@pytest.mark.usefixtures("hopper")
def test_what_packed_rows_need():
    ids = ids_of(np.asarray(SEGMENTS))
    assert not supports_packed_rows(masks.packed(ids), 4, 4)  # no lengths
    assert not supports_packed_rows(Mask(ids, segment_lengths=SEGMENTS), 4, 4)  # not causal
    keys = Mask(ids, key_lengths=jnp.ones((4, 1), jnp.int32), segment_lengths=SEGMENTS, causal=True)
    assert not supports_packed_rows(keys, 4, 4)


def test_older_gpus_get_an_array(monkeypatch):
    monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: float(capability) <= 8.0)
    mask = masks.packed(ids_of(np.asarray(SEGMENTS)), SEGMENTS)
    assert not supports_packed_rows(mask, 4, 4)
