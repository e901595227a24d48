"""Implementations of attention against the reference: results and gradients, on one device and on meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.ops.attention import AXES, masks, reference
from dreamllm_jax.ops.attention.chunked import chunked_attention
from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.attention.reference import reference_attention
from dreamllm_jax.ops.attention.splash import splash_attention
from dreamllm_jax.sharding import make_mesh


def random_qkv(batch, length, keys, heads=4, kv_heads=2, width=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, length, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def segments(batch, length, seed=0):
    """Documents of different lengths in each row, then padding; the last row is padding alone."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(1, length, (batch, 4)), axis=1)
    ids = (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1) + 1
    ids[ids == 5] = 0
    ids[-1] = 0
    return jnp.asarray(ids, jnp.int32)


def results(function, q, k, v, mask):
    """Returns the result and the gradients of a loss to which every entry contributes differently."""

    @jax.jit
    def both(q, k, v, mask):
        def loss(q, k, v):
            out = function(q, k, v, mask).astype(jnp.float32)
            return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1]))), out

        grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return both(q, k, v, mask)


def assert_equals_reference(function, q, k, v, mask, tolerance=2e-5):
    expected = results(reference_attention, q, k, v, mask)
    for name, a, b in zip("out dq dk dv".split(), results(function, q, k, v, mask), expected, strict=True):
        scale = float(jnp.abs(b).max()) or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=name)


SMALL = partial(chunked_attention, queries=16)
INTERPRETED = partial(splash_attention, interpret=True)
MASKS = {
    "none": lambda length: None,
    "causal": lambda length: Mask(causal=True),
    "packed": lambda length: masks.packed(segments(2, length)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [64, 37])
def test_chunked(mask, length):
    assert_equals_reference(SMALL, *random_qkv(2, length, length), MASKS[mask](length))


def test_chunked_on_a_cache():
    positions = jnp.array([[3], [20]]) + jnp.arange(40)
    mask = masks.cached(positions, positions < 50)
    assert_equals_reference(SMALL, *random_qkv(2, 40, 64), mask)
    assert_equals_reference(SMALL, *random_qkv(2, 40, 64), Mask(key_lengths=jnp.array([[64], [9]])))


@pytest.mark.parametrize(("keys", "parts"), [(2048, 1), (2112, 2), (4096, 2), (8192, 4), (4099, 1)])
def test_one_query_on_a_long_cache(keys, parts, monkeypatch):
    """On GPUs a sum over more than 2,048 keys is split into equal parts, if there are such parts."""
    q, k, v = random_qkv(2, 1, keys, kv_heads=4)
    assert reference._parts(q, k) == parts
    assert reference._parts(q, k[:, :, :2]) == 1  # shared keys: the products are not sums
    mask = Mask(key_lengths=jnp.array([[keys], [3]]))
    expected = reference_attention(q, k, v, mask)
    monkeypatch.setattr(reference, "platform", lambda: "gpu")
    monkeypatch.setattr(reference.cpu, "is_target", lambda: False)
    np.testing.assert_allclose(reference_attention(q, k, v, mask), expected, atol=1e-6)


def test_chunked_sums_gradients_of_keys_in_float32():
    q, k, v = random_qkv(1, 256, 256, dtype=jnp.bfloat16)
    exact = results(reference_attention, *(x.astype(jnp.float32) for x in (q, k, v)), None)
    errors = [
        [float(jnp.linalg.norm(a.astype(jnp.float32) - b)) for a, b in zip(got[2:], exact[2:], strict=True)]
        for got in (results(SMALL, q, k, v, None), results(reference_attention, q, k, v, None))
    ]
    assert all(a < 1.1 * b for a, b in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length, width", [(256, 64), (200, 80)])
def test_splash(mask, length, width):
    """A length of 200 is padded to 256. A row of padding alone attends to itself."""
    assert_equals_reference(INTERPRETED, *random_qkv(2, length, length, width=width), MASKS[mask](length))


def test_splash_from_queries_to_more_keys():
    assert_equals_reference(INTERPRETED, *random_qkv(2, 128, 200), None)


@pytest.mark.parametrize("function", [SMALL, INTERPRETED], ids=["chunked", "splash"])
@pytest.mark.parametrize(
    ("sizes", "kv_heads"),
    [((2, 1, 2, 2), 2), ((1, 2, 1, 4), 2), ((1, 1, 4, 2), 2)],
    ids=["data, tensor, context", "fsdp, context", "more devices than key heads"],
)
def test_packed_rows_on_a_mesh(devices, function, sizes, kv_heads):
    mesh = make_mesh(MeshConfig(*sizes), devices)
    arrays, mask = random_qkv(2, 512, 512, kv_heads=kv_heads), masks.packed(segments(2, 512))
    with jax.set_mesh(mesh):
        assert_equals_reference(function, *arrays, mask)


@pytest.mark.parametrize("function", [SMALL, INTERPRETED], ids=["chunked", "splash"])
@pytest.mark.parametrize("mask", [None, Mask(segments(2, 384))], ids=["none", "segments"])
def test_a_sharded_length_without_causality(devices, function, mask):
    """The length of 384 is split into four parts, for which the kernel pads it to 512."""
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 1, 4), devices)):
        assert_equals_reference(function, *random_qkv(2, 384, 384), mask)


@pytest.mark.parametrize("function", [SMALL, INTERPRETED], ids=["chunked", "splash"])
@pytest.mark.parametrize("pictures", [8, 4])
def test_pictures_on_a_mesh(devices, function, pictures):
    """Eight images are split over all axes. Four leave the axis `tensor` to the heads."""
    mesh = make_mesh(MeshConfig(1, 2, 2, 2), devices)
    with jax.set_mesh(mesh):
        arrays = random_qkv(pictures, 128, 128, kv_heads=4)
        assert_equals_reference(partial(function, axes=AXES["pictures"]), *arrays, None)
