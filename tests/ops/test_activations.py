"""Activations in low precision: one rounding, and what the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.ops.activations import ACTIVATIONS

VALUES = jnp.asarray(np.random.default_rng(0).normal(size=4096) * 3, jnp.bfloat16)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16_are_rounded_once(name):
    """Values and gradients are the nearest bfloat16 to the exact ones, as PyTorch computes them."""
    function, exact = ACTIVATIONS[name], VALUES.astype(jnp.float32)
    ours = function(VALUES)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, function(exact).astype(jnp.bfloat16))
    slope = jax.vmap(jax.grad(lambda x: function(x).astype(jnp.float32)))
    np.testing.assert_allclose(
        slope(VALUES).astype(jnp.float32), slope(exact).astype(jnp.bfloat16).astype(jnp.float32), atol=2e-2
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_backward_pass_keeps_only_the_input(name):
    _, pull = jax.vjp(ACTIVATIONS[name], VALUES)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) == VALUES.size]
    assert kept and all(leaf.dtype == jnp.bfloat16 for leaf in kept)
