"""The small shared layers: activations in low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.models.layers import ACTIVATIONS, Dense, linear, product
from dreamllm_jax.models.unet_blocks import GroupNorm

VALUES = jnp.asarray(np.random.default_rng(0).normal(size=4096) * 3, jnp.bfloat16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16_are_rounded_once(name):
    """The nearest bfloat16 to the exact value, as PyTorch computes them; gradients too."""
    function, exact = ACTIVATIONS[name], VALUES.astype(jnp.float32)
    ours = function(VALUES)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, function(exact).astype(jnp.bfloat16))
    slope = jax.vmap(jax.grad(lambda x: function(x).astype(jnp.float32)))
    np.testing.assert_allclose(
        slope(VALUES).astype(jnp.float32), slope(exact).astype(jnp.bfloat16).astype(jnp.float32), atol=2e-2
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_of_an_activation_only_its_input_is_kept(name):
    _, pull = jax.vjp(ACTIVATIONS[name], VALUES)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) == VALUES.size]
    assert kept and all(leaf.dtype == jnp.bfloat16 for leaf in kept)


@pytest.mark.parametrize("activated", [False, True], ids=["alone", "with SiLU"])
def test_group_norm_has_the_gradients_that_autodiff_derives(activated):
    rng = np.random.default_rng(0)
    x, pull = (jnp.asarray(rng.normal(1, 2, (2, 3, 5, 8)), jnp.float32) for _ in range(2))
    params = {"scale": jnp.asarray(rng.normal(1, 0.5, 8)), "bias": jnp.asarray(rng.normal(size=8))}
    params = jax.tree.map(lambda y: y.astype(jnp.float32), params)
    norm = GroupNorm(4, 1e-3, silu=activated)

    def by_definition(params, x):
        grouped = x.reshape(2, 15, 4, 2)
        mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        y = ((grouped - mean) / jnp.sqrt(var + 1e-3)).reshape(x.shape) * params["scale"] + params["bias"]
        return jax.nn.silu(y) if activated else y

    (ours, back), (theirs, other) = (
        jax.vjp(f, params, x) for f in (lambda p, x: norm.apply({"params": p}, x), by_definition)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for mine, wanted in zip(*map(jax.tree.leaves, (back(pull), other(pull))), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


def test_a_scanned_group_norm_keeps_no_float32_copy_of_its_input():
    norm = GroupNorm(2, dtype=jnp.bfloat16)
    params = norm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))

    def three(x):
        return jax.lax.scan(lambda y, _: (norm.apply(params, y), None), x, length=3)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(three))(jnp.ones((2, 4, 4, 8), jnp.bfloat16)))
    assert "bf16[3,2,4,4,8]" in program and "f32[3,2,4,4,8]" not in program


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_for_cpu_has_the_gradients_that_autodiff_derives(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 5, 3), (3, 4), (2, 5, 4))
    x, kernel, pull = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    (ours, back), (theirs, other) = (jax.vjp(f, x, kernel) for f in (product, jnp.matmul))
    assert ours.dtype == dtype
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        assert mine.dtype == wanted.dtype
        # In bfloat16 the backends of the two forms may round sums at other places.
        bounds = dict(rtol=1e-5, atol=1e-6) if dtype == jnp.float32 else dict(rtol=2e-2, atol=2e-2)
        np.testing.assert_allclose(*(y.astype(jnp.float32) for y in (mine, wanted)), **bounds)
    dense = Dense(4, dtype=dtype)
    applied = dense.apply({"params": {"kernel": kernel, "bias": jnp.ones(4)}}, x)
    np.testing.assert_array_equal(applied, ours + jnp.ones(4, dtype))


@pytest.mark.parametrize("width", [6, 5], ids=["halves", "whole"])
def test_one_row_is_multiplied_as_many_are(width):
    rng = np.random.default_rng(0)
    x, kernel, pull = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 1, width), (width, 4), (1, 1, 4))
    )
    (ours, back), (theirs, other) = (jax.vjp(f, x, kernel) for f in (linear, jnp.matmul))
    for mine, wanted in zip((ours, *back(pull)), (theirs, *other(pull)), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)
    assert ("f32[2,3,4]" in str(jax.make_jaxpr(linear)(x, kernel))) == (width == 6)
