"""The train state: optimizer state for trainable parameters only, and everything sharded by the rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamllm_jax.config.train import Recipe, TokenizerConfig
from dreamllm_jax.sharding import make_mesh, parameter_shardings
from dreamllm_jax.train.state import create_state, final_params, is_trainable, partition, stage_seed
from dreamllm_jax.train.step import gradients
from tests.train import tiny

TRAINABLE = ("vision_projector", "dream_queries", "llama/layers/.*/q_proj")


@pytest.fixture(scope="module")
def stage():
    return tiny.stage(trainable=TRAINABLE, optim=dict(ema_decay=0.9))


@pytest.fixture(scope="module")
def recipe(stage):
    return Recipe(
        "tiny", tiny.config(), (stage,), tokenizer=TokenizerConfig(path="x"), frozen_dtype="bfloat16"
    )


@pytest.fixture(scope="module")
def state(params, stage, recipe, devices):
    return create_state(params, stage, recipe, make_mesh(recipe.mesh, devices))


def test_trained_and_frozen(state, params):
    paths = {
        "vision_projector/linear_0/kernel",
        "vision_projector/linear_0/bias",
        "dream_queries/dream_queries",
        "llama/layers/self_attn/q_proj/kernel",
    }
    assert state.trainable.keys() == paths and state.frozen.keys() == params.keys() - paths
    for path, value in state.trainable.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, params[path])
    for path, value in state.frozen.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, jnp.asarray(params[path], jnp.bfloat16))
    final = final_params(state, params)
    assert final.keys() == params.keys()
    assert all(final[path] is params[path] for path in state.frozen)


def test_the_optimizer_knows_the_trained_alone(state):
    for moment in ("mu", "nu"):
        found = optax.tree_utils.tree_get(state.opt_state, moment)
        assert found.keys() == state.trainable.keys()
        for path, value in found.items():
            assert value.sharding == state.trainable[path].sharding, path
    counted = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert counted == 2 * sum(x.size for x in state.trainable.values())


def test_the_frozen_get_no_gradient(state, batch, keys, stage):
    run = functools.partial(gradients, model=tiny.model(), stage=stage)
    shapes, _ = jax.eval_shape(run, state.trainable, state.frozen, batch, keys)
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in state.trainable.items()}


def test_places(state, devices, recipe):
    everything = {**state.frozen, **state.trainable}
    shardings = parameter_shardings(everything, make_mesh(recipe.mesh, devices))
    for path, value in everything.items():
        assert value.sharding == shardings[path], path
    kernel = state.trainable["llama/layers/self_attn/q_proj/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64 // 8, 64)
    assert state.ema.keys() == state.trainable.keys()
    assert (
        state.ema["dream_queries/dream_queries"].sharding
        == state.trainable["dream_queries/dream_queries"].sharding
    )


def test_params_survive_the_donation_of_the_state(devices, stage, recipe):
    mesh = make_mesh(recipe.mesh, devices)
    given = {
        k: jax.device_put(v, parameter_shardings({k: v}, mesh)[k])
        for k, v in tiny.random_params(tiny.config()).items()
    }
    state = create_state(given, stage, recipe, mesh)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s.trainable), donate_argnums=0)(state)
    assert not any(value.is_deleted() for value in given.values())


def test_no_average_where_it_is_off(params, stage, recipe, devices):
    without = tiny.stage(trainable=TRAINABLE)
    state = create_state(params, without, recipe, make_mesh(recipe.mesh, devices))
    assert state.ema == {}
    path = "dream_queries/dream_queries"
    assert final_params(state, params)[path] is state.trainable[path]


def test_every_stage_and_seed_has_its_own_data(recipe):
    one, other = tiny.stage(name="one"), tiny.stage(name="other")
    seeds = {stage_seed(dataclasses.replace(recipe, seed=s), t) for s in (0, 1) for t in (one, other)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("llama/norm/scale", "llama", True),
        ("llama/norm/scale", "lla", False),
        ("llama/norm/scale", "norm", False),
        ("llama/norm/scale", "llama/norm/scale", True),
        ("vision_projector/linear_0/bias", "vision", False),
        ("vision/embeddings/class_embedding", "vision", True),
        ("llama/layers/mlp/up_proj/kernel", "llama/.*/(up|down)_proj", True),
        ("llama/layers/mlp/gate_proj/kernel", "llama/.*/(up|down)_proj", False),
        ("unet/conv_in/kernel", "vae|unet", True),
        ("unet_x/conv_in/kernel", "vae|unet", False),
    ],
)
def test_patterns(path, pattern, expected):
    assert is_trainable(path, [pattern]) is expected


def test_partition_refuses_what_matches_nothing():
    params = dict.fromkeys(["llama/a", "unet/b"])
    assert partition(params, ["unet"]) == ({"unet/b": None}, {"llama/a": None})
    assert partition(params, []) == ({}, params)
    with pytest.raises(
        ValueError, match="pattern 'llma' matches no parameter of this model; its parts are llama, unet"
    ):
        partition(params, ["unet", "llma"])
    with pytest.raises(ValueError, match="is not a regular expression"):
        partition(params, ["unet("])
