"""The learning rate's values, and one update of the optimizer by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.train import OptimConfig
from dreamllm_jax.train.optim import learning_rates, make_optimizer


def test_warm_up_then_cosine():
    rates = learning_rates(OptimConfig(learning_rate=0.5, warmup_ratio=0.04), 100)
    assert rates.shape == (100,) and rates.dtype == np.float32
    np.testing.assert_allclose(rates[:4], 0.5 * np.array([1, 2, 3, 4]) / 4, rtol=1e-6)
    after = 0.5 * 0.5 * (1 + np.cos(np.pi * np.arange(96) / 96))
    np.testing.assert_allclose(rates[4:], after, rtol=1e-4, atol=1e-8)
    assert rates[52] == pytest.approx(0.25) and 0 < rates[-1] < 1e-3


def test_constant_after_warm_up():
    rates = learning_rates(OptimConfig(learning_rate=2.0, warmup_ratio=0.2, schedule="constant"), 10)
    np.testing.assert_allclose(rates, [1.0] + [2.0] * 9)


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 1), (0.0, 3), (1.0, 3), (0.003, 10)])
def test_short_runs_have_rates_too(ratio, steps):
    rates = learning_rates(OptimConfig(learning_rate=1.0, warmup_ratio=ratio), steps)
    assert rates.shape == (steps,) and (0 < rates).all() and rates.max() == 1.0


def test_one_update_by_hand():
    """Clipping, Adam, then weight decay (decoupled: arXiv 1711.05101), at rate 1 and uphill."""
    config = OptimConfig(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    params = {
        "a/kernel": jnp.array([2.0, -4.0]),
        "a/bias": jnp.array([1.0]),
        "b/norm/scale": jnp.array([1.0]),
    }
    grads = [
        {"a/kernel": jnp.array([3.0, 0.0]), "a/bias": jnp.array([4.0]), "b/norm/scale": jnp.array([0.0])},
        {"a/kernel": jnp.array([0.1, 0.2]), "a/bias": jnp.array([0.2]), "b/norm/scale": jnp.array([-0.1])},
    ]
    tx = make_optimizer(config)
    state, m, v = tx.init(params), 0.0, 0.0
    for step, grad in enumerate(grads, start=1):
        updates, state = tx.update(grad, state, params)
        flat = np.concatenate([grad[k] for k in params])
        flat = flat / max(1.0, np.linalg.norm(flat))
        m, v = 0.9 * m + 0.1 * flat, 0.99 * v + 0.01 * flat**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        expected = adam + 0.1 * np.array([2.0, -4.0, 0.0, 0.0])  # biases and norms do not decay
        np.testing.assert_allclose(
            np.concatenate([updates[k] for k in params]), expected, rtol=1e-5, atol=1e-7
        )


def test_without_clipping():
    tx = make_optimizer(OptimConfig(clip_norm=None, eps=1.0, b1=0.0, b2=0.0))
    params = {"a/kernel": jnp.array([0.0])}
    updates, _ = tx.update({"a/kernel": jnp.array([100.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], 100 / 101, rtol=1e-6)
