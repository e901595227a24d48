"""Learning rates, one optimizer update computed by hand, and the memory-saving moments against optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dreamllm_jax.config.train import MeshConfig, OptimConfig
from dreamllm_jax.sharding import make_mesh, parameter_shardings
from dreamllm_jax.train.optim import learning_rates, make_optimizer
from dreamllm_jax.train.state import optimizer_shardings


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


SHAPES = {
    "llama/layers/mlp/gate_proj/kernel": (2, 128, 256),
    "llama/layers/self_attn/o_proj/kernel": (2, 128, 128),
    "llama/embed_tokens/embedding": (256, 128),
    "dream_queries/dream_queries": (64, 128),  # too few rows to be worth it
    "llama/norm/scale": (128,),
}
LEAN = OptimConfig(optimizer="adafactor", mu_dtype="bfloat16", clip_norm=None)


def draw(seed):
    """Rows and columns have different sizes."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        for axis in range(len(shape)):
            yield rng.uniform(0.1, 2, shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis))
        yield rng.standard_normal(shape)

    return {path: jnp.float32(math.prod(numbers(*shape))) for path, shape in SHAPES.items()}


def updates_of(tx, params, steps=3):
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for seed in range(1, steps + 1):
        updates, state = update(draw(seed), state, params)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (
            LEAN,
            optax.adafactor(
                1.0, multiply_by_parameter_scale=False, momentum=0.9, dtype_momentum=jnp.bfloat16
            ),
        ),
        (OptimConfig(mu_dtype="bfloat16", clip_norm=None), optax.adam(1.0, mu_dtype=jnp.bfloat16)),
    ],
    ids=["adafactor", "adamw"],
)
def test_the_lean_ones_are_those_of_optax(config, theirs):
    params = draw(0)
    ours, expected = updates_of(make_optimizer(config), params)[0], updates_of(theirs, params)[0]
    for mine, other in zip(ours, expected, strict=True):
        for path in SHAPES:  # theirs go downhill
            np.testing.assert_allclose(mine[path], -other[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_what_the_lean_ones_hold():
    """2 bytes per weight for the first moment, and two vectors per large matrix for the second."""
    state = make_optimizer(LEAN).init(draw(0))
    weights = sum(int(np.prod(shape)) for shape in SHAPES.values())
    vectors = 2 * (128 + 256) + 2 * (128 + 128) + (256 + 128)
    whole = 64 * 128 + 128
    held = sum(x.nbytes for x in jax.tree.leaves(state) if x.size > 1)
    assert held == 2 * weights + 4 * (vectors + whole)


@pytest.mark.parametrize("shape", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)])
def test_the_lean_ones_on_a_mesh(shape, devices):
    mesh, tx, params = make_mesh(MeshConfig(**shape), devices), make_optimizer(LEAN), draw(0)
    split = parameter_shardings(params, mesh)
    placed = {path: jax.device_put(x, split[path]) for path, x in params.items()}
    shardings = optimizer_shardings(tx, placed, mesh)
    state = jax.jit(tx.init, out_shardings=shardings)(placed)
    update = jax.jit(tx.update, out_shardings=(split, shardings))
    expected, alone = updates_of(tx, params)
    for seed, wanted in enumerate(expected, start=1):
        updates, state = update(jax.device_put(draw(seed), split), state, placed)
        for path in SHAPES:  # now and then bfloat16 rounds otherwise
            error = jnp.linalg.norm(updates[path] - wanted[path]) / jnp.linalg.norm(wanted[path])
            assert error < 1e-3, path
    rows, columns = (optax.tree_utils.tree_get(state, name) for name in ("v_row", "v_col"))
    wide = "llama/layers/mlp/gate_proj/kernel"
    fsdp, tensor = ((n,) if mesh.shape[n] > 1 else None for n in ("fsdp", "tensor"))
    assert split[wide].spec == PartitionSpec(None, fsdp, tensor)
    assert rows[wide].shape == (2, 128) and rows[wide].sharding.spec == PartitionSpec(None, fsdp)
    assert columns[wide].shape == (2, 256) and columns[wide].sharding.spec == PartitionSpec(None, tensor)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, alone)
