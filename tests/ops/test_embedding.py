"""The embedding lookup on meshes against numpy's indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.ops.embedding import embedding_lookup
from dreamllm_jax.sharding import make_mesh, parameter_shardings


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 4, 1, 1), (1, 2, 2, 2), (1, 1, 8, 1)], ids=str)
def test_lookup_on_a_mesh(sizes, rows, devices):
    """Values and the gradient of the table, including numbers of rows that the devices do not divide."""
    mesh = make_mesh(MeshConfig(*sizes), devices)
    rng = np.random.default_rng(rows)
    table = rng.normal(size=(48, 16)).astype(np.float32)
    tokens = jnp.asarray(rng.integers(0, 48, (rows, 6)), jnp.int32)
    weights = rng.normal(size=(rows, 6, 16)).astype(np.float32)
    shardings = parameter_shardings({"llama/embed_tokens/embedding": table}, mesh)
    table = jax.device_put(table, shardings["llama/embed_tokens/embedding"])
    with jax.set_mesh(mesh):
        found = jax.jit(embedding_lookup)(table, tokens)
        gradient = jax.jit(jax.grad(lambda t: (embedding_lookup(t, tokens) * weights).sum()))(table)
        outside = jax.jit(embedding_lookup)(table, jnp.full((rows, 6), 48))
    np.testing.assert_array_equal(found, np.asarray(table)[tokens])
    expected = np.zeros((48, 16), np.float32)
    np.add.at(expected, np.asarray(tokens), weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(outside).all()
