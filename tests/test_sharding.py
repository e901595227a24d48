"""The rule tables: every parameter has one row, every row a use; meshes and places; what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.handwriting import model as handwriting
from dreamllm_jax.config.model import model_config
from dreamllm_jax.config.towers import UNetConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.sharding import (
    BATCH_AXES,
    PARAMETER_RULES,
    constrain,
    make_mesh,
    match_rule,
    parameter_shardings,
    parameter_spec,
    shard_batch,
)
from dreamllm_jax.train.state import abstract_params

SD21 = dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VISION = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14
)
MODELS = {
    "handwriting": handwriting(),
    "7B with SD 1.5": dict(llama={}, vision=VISION, unet={}, vae={}),
    "7B with SD 2.1": dict(llama={}, vision=VISION, unet=SD21, vae={}),
    "7B with SDXL": dict(
        llama={},
        vision=VISION,
        vision_projector=dict(kind="sam", depth=2),
        unet=SDXL,
        vae={},
        image_size=1024,
    ),
}


@functools.cache
def params_of(name):
    return abstract_params(model_config(MODELS[name]))


def rows_of(path):
    return [row for row, _ in PARAMETER_RULES if re.fullmatch(row, path)]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_rule(name):
    assert len(params_of(name)) > 300
    wrong = {path: rows_of(path) for path in params_of(name) if len(rows_of(path)) != 1}
    assert not wrong


def test_every_rule_is_used():
    used = {row for name in MODELS for path in params_of(name) for row in rows_of(path)}
    assert {row for row, _ in PARAMETER_RULES} == used


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "handwriting"])
def test_nothing_large_is_whole_anywhere(name, mesh, devices):
    mesh, params = make_mesh(MeshConfig(*mesh), devices), params_of(name)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    shardings = parameter_shardings(params, mesh)
    held = sum(np.prod(shardings[k].shard_shape(v.shape), dtype=float) for k, v in params.items())
    assert held < 1.02 / split * sum(float(v.size) for v in params.values())


@pytest.fixture(scope="module")
def cube(devices):
    return make_mesh(MeshConfig(2, 2, 2), devices)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("llama/norm/scale", (64,), ()),
        ("llama/layers/input_layernorm/scale", (2, 64), ()),
        ("llama/embed_tokens/embedding", (408, 64), (("tensor",), ("fsdp",))),
        ("llama/lm_head/kernel", (64, 408), (("fsdp",), ("tensor",))),
        ("llama/layers/self_attn/q_proj/kernel", (2, 64, 32), (None, ("fsdp",), ("tensor",))),
        ("llama/layers/self_attn/o_proj/kernel", (2, 32, 64), (None, ("tensor",), ("fsdp",))),
        ("unet/conv_in/kernel", (3, 3, 4, 32), (None, None, None, ("tensor",))),
        ("unet/conv_out/kernel", (3, 3, 32, 4), (None, None, ("fsdp",), None)),
        (
            "vae/encoder/mid_block/resnets_0/conv1/kernel",
            (3, 3, 32, 64),
            (None, None, ("fsdp",), ("tensor",)),
        ),
    ],
)
def test_places(path, shape, expected, cube):
    assert parameter_spec(path, shape, cube) == PartitionSpec(*expected)


def test_an_axis_of_one_device_splits_nothing(devices):
    mesh = make_mesh(MeshConfig(data=8, fsdp=1), devices)
    assert parameter_spec("llama/lm_head/kernel", (63, 321), mesh) == PartitionSpec(None, None)


def test_what_has_no_place_is_refused(cube):
    with pytest.raises(
        ValueError, match="'llama/new/kernel' matches no row of sharding.PARAMETER_RULES; add one"
    ):
        match_rule("llama/new/kernel")
    with pytest.raises(
        ValueError, match=r"'llama/lm_head/kernel' of shape \(64, 321\): dimension 321 is not divisible"
    ):
        parameter_spec("llama/lm_head/kernel", (64, 321), cube)


def test_rows_that_disagree_are_refused(monkeypatch):
    rules = ((r"a/.*", ("weight_in",)), (r".*/b", ("weight_out",)), (r".*/b|c", ("weight_out",)))
    monkeypatch.setattr("dreamllm_jax.sharding.PARAMETER_RULES", rules)
    assert match_rule("a/c")[1] == ("weight_in",) and match_rule("x/b")[1] == ("weight_out",)
    with pytest.raises(ValueError, match="'a/b' matches several rows"):
        match_rule("a/b")


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(2, 2, 2), (2, 2, 2, 1)),
        (MeshConfig(-1, 2, 2), (2, 2, 2, 1)),
        (MeshConfig(1, 1, -1, 2), (1, 1, 4, 2)),
    ],
)
def test_meshes(config, shape, devices):
    mesh = make_mesh(config, devices)
    assert tuple(mesh.shape.values()) == shape and list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            MeshConfig(3, 1),
            "does not divide the 8 devices; the axes must multiply to 8, or one of them be -1",
        ),
        (MeshConfig(3, -1), "does not divide the 8 devices"),
        (MeshConfig(2, 2), "does not divide the 8 devices"),
        (MeshConfig(-1, -1), "at most one -1"),
        (MeshConfig(0, 8), "sizes must be positive"),
        (MeshConfig(-2, -4), "sizes must be positive"),
    ],
)
def test_bad_meshes(config, sentence, devices):
    with pytest.raises(ValueError, match=sentence):
        make_mesh(config, devices)


def test_shard_batch(cube):
    rows = {"a": np.arange(24).reshape(8, 3), "none": None}
    placed = shard_batch(rows, cube)
    np.testing.assert_array_equal(placed["a"], rows["a"])
    assert placed["none"] is None and placed["a"].sharding.spec == PartitionSpec(BATCH_AXES)
    assert {shard.data.shape for shard in placed["a"].addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match=r"A batch of 6 rows is not divisible by data x fsdp = 4 devices"):
        shard_batch(np.zeros((6, 3)), cube)


def test_constrain(cube):
    x = jnp.ones((8, 6, 4))
    assert constrain(x, "batch", "length", "mlp") is x  # without a mesh
    with jax.set_mesh(cube):
        split = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
        odd = jax.jit(lambda x: constrain(x, "batch", None, "mlp"))(jnp.ones((6, 6, 5)))
        with pytest.raises(AssertionError, match="2 axes for an array of shape"):
            constrain(x, "batch", "length")
    assert {shard.data.shape for shard in split.addressable_shards} == {(2, 6, 2)}
    assert {shard.data.shape for shard in odd.addressable_shards} == {(3, 6, 5)}  # over data, not fsdp


def test_sdxl_pools_its_text():
    assert UNetConfig(**SDXL).pooled_text_dim == 1280
    paths = params_of("7B with SDXL")
    assert paths["global_projector/linear_0/kernel"].shape == (4096, 1280)
