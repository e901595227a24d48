"""The joint loss of the tiny model, compiled once for all tests here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax.train.objectives import OBJECTIVES, loss_counts, sample_noise
from dreamllm_jax.train.step import row_prng_keys
from tests.train import tiny


@pytest.fixture(scope="session")
def params():
    return tiny.random_params(tiny.config())


@pytest.fixture(scope="session")
def documents():
    return tiny.documents(3 * tiny.ROWS - 1)


@pytest.fixture(scope="session")
def batch(documents):
    return tiny.packed(tiny.rows_of(documents))


@pytest.fixture(scope="session")
def keys():
    return row_prng_keys(jax.random.key(7), jnp.int32(3), tiny.ROWS)


@pytest.fixture(scope="session")
def step_noise(keys, batch):
    drawn = jax.jit(lambda k: sample_noise(k, batch.dream_mask.shape[1], tiny.config(), tiny.stage().loss))(
        keys
    )
    return jax.tree.map(np.asarray, drawn)


@pytest.fixture(scope="session")
def joint():
    """(params, batch, step_noise, counts) -> (loss, metrics, gradients), on one device."""

    def loss(params, batch, step_noise, counts):
        return OBJECTIVES["joint"](
            tiny.model(), unflatten_dict(params, sep="/"), batch, step_noise, tiny.stage().loss, counts
        )

    @jax.jit
    def run(params, batch, step_noise, counts):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, step_noise, counts)
        return value, metrics, grads

    return lambda *args: jax.tree.map(np.asarray, run(*args))


@pytest.fixture(scope="session")
def packed_result(joint, params, batch, step_noise):
    return joint(params, batch, step_noise, loss_counts(batch))


@pytest.fixture(scope="session")
def assert_same_gradients():
    """Compares gradients to float32 accuracy: each to its own norm, the vanishing ones to the whole's."""

    def norm(x):
        return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))

    def check(ours, theirs, own=1e-4, overall=1e-6):
        assert ours.keys() == theirs.keys()
        total = norm([norm(g) for g in theirs.values()])
        assert total > 0
        wrong = {}
        for path, expected in theirs.items():
            error = norm(np.asarray(ours[path], np.float64) - np.asarray(expected, np.float64))
            if not error <= own * norm(expected) + overall * total:
                wrong[path] = (error, norm(expected))
        assert not wrong, f"whole gradient {total}; (error, norm) of {wrong}"

    return check
