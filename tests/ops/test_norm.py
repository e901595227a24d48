"""Group normalization against its definition, and what its backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.ops.norm import GroupNorm


@pytest.mark.parametrize("with_silu", [False, True], ids=["alone", "with SiLU"])
def test_group_norm_has_the_gradients_that_autodiff_derives(with_silu):
    rng = np.random.default_rng(0)
    x, pull = (jnp.asarray(rng.normal(1, 2, (2, 3, 5, 8)), jnp.float32) for _ in range(2))
    params = {"scale": jnp.asarray(rng.normal(1, 0.5, 8)), "bias": jnp.asarray(rng.normal(size=8))}
    params = jax.tree.map(lambda y: y.astype(jnp.float32), params)
    norm = GroupNorm(4, 1e-3, silu=with_silu)

    def by_definition(params, x):
        grouped = x.reshape(2, 15, 4, 2)
        mean, var = (f(grouped, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        y = ((grouped - mean) / jnp.sqrt(var + 1e-3)).reshape(x.shape) * params["scale"] + params["bias"]
        return jax.nn.silu(y) if with_silu else y

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
