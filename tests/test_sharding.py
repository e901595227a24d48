"""The sharding rules: every parameter matches one row, every row is used; meshes; what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dreamllm_jax.config.model import model_config
from dreamllm_jax.config.towers import UNetConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.sharding import (
    BATCH_AXES,
    MESH_AXIS_NAMES,
    PARAMETER_RULES,
    activation_spec,
    arrange_devices,
    constrain,
    make_mesh,
    match_rule,
    mesh_axes,
    parameter_shardings,
    parameter_spec,
    shard_batch,
)
from examples.handwriting.config import model as handwriting

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

GENERATING = "generating: "
NAMES = (*MODELS, f"{GENERATING}7B with SD 1.5")


@functools.cache
def params_of(name):
    """Returns the shapes of a model's parameters, after "generating: " in the layout of generation."""
    config = model_config(MODELS[name.removeprefix(GENERATING)])
    params = abstract_params(config)
    if not name.startswith(GENERATING):
        return params
    return jax.eval_shape(functools.partial(generation_layout, config=config.llama), params)


def rows_of(path):
    return [row for row, _ in PARAMETER_RULES if re.fullmatch(row, path)]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_rule(name):
    assert len(params_of(name)) > 300
    wrong = {path: rows_of(path) for path in params_of(name) if len(rows_of(path)) != 1}
    assert not wrong


def test_every_rule_is_used():
    used = {row for name in NAMES for path in params_of(name) for row in rows_of(path)}
    assert {row for row, _ in PARAMETER_RULES} == used


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "handwriting"])
def test_no_large_parameter_is_replicated(name, mesh, devices):
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
        ("llama/layers/mlp/up_proj/kernel", (2, 64, 128), (None, ("fsdp",), ("tensor",))),  # the docstring
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
def test_parameter_specs(path, shape, expected, cube):
    assert parameter_spec(path, shape, cube) == PartitionSpec(*expected)


def test_an_axis_of_one_device_splits_nothing(devices):
    mesh = make_mesh(MeshConfig(data=8, fsdp=1), devices)
    assert parameter_spec("llama/lm_head/kernel", (63, 321), mesh) == PartitionSpec(None, None)


def test_unmatched_and_indivisible_parameters_are_refused(cube):
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
            "does not match the 8 devices; the product of its axes must be 8, or one of them -1",
        ),
        (MeshConfig(3, -1), "the product of the sizes is 3, which does not divide the 8 devices; reduce one"),
        (MeshConfig(2, 2), "does not match the 8 devices"),
        (MeshConfig(-1, -1), "at most one may be -1"),
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
    assert {shard.data.shape for shard in odd.addressable_shards} == {
        (3, 6, 5)
    }  # split over data but not over fsdp


def test_the_activation_in_the_docstring(devices):
    mesh = make_mesh(MeshConfig(1, 2, 2), devices[:4])
    axes = ("pictures", None, "heads", "head_dim")
    assert activation_spec(axes, (4, 9, 2, 8), mesh) == PartitionSpec(("fsdp", "tensor"), None, None, None)
    expected = PartitionSpec(("fsdp",), None, ("tensor",), None)
    assert activation_spec(axes, (2, 9, 2, 8), mesh) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", "length", "mlp"), (8, 6, 4), (("data", "fsdp"), None, ("tensor",))),
        (
            ("pictures", "height", "width", "channels"),
            (16, 3, 3, 4),
            (("data", "fsdp", "tensor"),) + (None,) * 3,
        ),
        (("pictures", None, "heads", "head_dim"), (4, 9, 2, 8), (("data", "fsdp"), None, ("tensor",), None)),
        (
            ("pictures", None, "heads", "head_dim"),
            (8, 9, 2, 8),
            (("data", "fsdp", "tensor"), None, None, None),
        ),
        (("pictures", None), (6, 9), (("data",), None)),
        (("pictures", None), (7, 9), (None, None)),
    ],
)
def test_activations_use_each_axis_once_and_only_if_it_divides(axes, shape, expected, cube):
    assert activation_spec(axes, shape, cube) == PartitionSpec(*expected)


def test_frozen_towers_are_replicated_on_request(cube):
    params = {k: v for k, v in params_of("7B with SD 2.1").items() if k.endswith("/kernel")}
    sliced, replicated = (parameter_shardings(params, cube, names) for names in ((), ("unet", "vae")))
    for path, sharding in replicated.items():
        tower = path.split("/")[0] in ("unet", "vae")
        axes = {name for entry in sharding.spec for name in mesh_axes(entry)}
        assert "fsdp" not in axes if tower else sharding == sliced[path]
    assert any("fsdp" in str(sliced[path].spec) for path in params if path.startswith("unet/"))


def test_256_devices_cannot_shard_a_unet_but_can_replicate_it():
    mesh = AbstractMesh((1, 256, 1, 1), MESH_AXIS_NAMES)
    path, shape = "unet/down_blocks_0/resnets_0/conv1/kernel", (3, 3, 320, 320)
    with pytest.raises(
        ValueError, match="not divisible by mesh axes {'fsdp': 256}.*name it in mesh.replicated"
    ):
        parameter_spec(path, shape, mesh)
    assert parameter_spec(path, shape, mesh, gathered=True) == PartitionSpec(None, None, None, None)


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that `make_mesh` reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0
    core_on_chip: int = 0


def chips(slices: int) -> list[Chip]:
    """Returns the chips of slices of 2x2x2, in reverse order."""
    in_order = [Chip(i, (i % 2, i // 2 % 2, i // 4 % 2), i // 8) for i in range(8 * slices)]
    return in_order[::-1]


def test_only_data_crosses_slices():
    placed = arrange_devices((4, 2, 2, 1), chips(2))
    assert placed.shape == (4, 2, 2, 1)
    for row, index in zip(placed, (0, 0, 1, 1), strict=True):
        assert {chip.slice_index for chip in row.flat} == {index}
    with pytest.raises(ValueError, match="mesh.data is 1 on 2 slices.*choose a multiple of 2"):
        arrange_devices((1, 16, 1, 1), chips(2))


def test_neighbours_on_an_axis_are_neighbours_in_the_network():
    placed = arrange_devices((1, 4, 2, 1), chips(1))[0, :, :, 0]
    for pair in placed:  # along tensor: one step in one direction
        assert sum(abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords, strict=True)) == 1


def test_sdxl_pools_its_text():
    assert UNetConfig(**SDXL).pooled_text_dim == 1280
    paths = params_of("7B with SDXL")
    assert paths["global_projector/linear_0/kernel"].shape == (4096, 1280)
