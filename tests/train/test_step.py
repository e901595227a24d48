"""A step gives the same result on every mesh and with any number of micro-batches."""

import functools

import jax
import numpy as np
import pytest

from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.sharding import make_mesh, parameter_shardings, replicated, shard_batch
from dreamllm_jax.train.step import cast_for_compute, gradients
from tests.train import tiny

ALONE = MeshConfig(data=1, fsdp=1)
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
LONG = MeshConfig(data=1, fsdp=2, tensor=2, context=2)
TWO = dict(grad_accum_steps=2)
CASES = {
    "1 device": (ALONE, {}),
    "8 data": (MeshConfig(data=8, fsdp=1), {}),
    "8 fsdp": (MeshConfig(data=1, fsdp=8), {}),
    "2x2x2": (CUBE, {}),
    "8 tensor": (MeshConfig(data=1, fsdp=1, tensor=8), {}),
    "2 fsdp, 4 context": (MeshConfig(data=1, fsdp=2, context=4), {}),
    "1 device, 2 micro-batches": (ALONE, TWO),
    "2x2x2, 2 micro-batches": (CUBE, TWO),
    "2x2x2, 2 micro-batches, gathered once": (CUBE, TWO | dict(gather="step")),
    "2x2x2 with context, 2 micro-batches, gathered once": (LONG, TWO | dict(gather="step")),
}


CONNECTORS = ("vision_projector", "dream_queries", "condition_projector")
SPREAD = MeshConfig(data=2, fsdp=2, context=2)
# What is trained, and how: as the recipes of 7B have it, with their frozen towers whole along fsdp.
FROZEN = {
    "2x2x2, 2 micro-batches": (CUBE, ("llama", *CONNECTORS), TWO),
    "2x2x2 with context, 2 micro-batches, gathered once": (
        LONG,
        ("llama", *CONNECTORS),
        TWO | dict(gather="step"),
    ),
    "data and context, connectors alone": (SPREAD, CONNECTORS, {}),
}


@pytest.fixture
def check_step(devices, params, batch, keys, packed_result, assert_same_gradients):
    """Metrics and gradients, with some parts frozen, equal those of one device."""

    def check(config: MeshConfig, trained: tuple[str, ...] | None, optim: dict) -> None:
        mesh = make_mesh(config, devices if config != ALONE else devices[:1])
        shardings = parameter_shardings(params, mesh, () if trained is None else ("unet", "vae", "vision"))
        placed = {k: jax.device_put(v, shardings[k]) for k, v in params.items()}
        frozen = {k: v for k, v in placed.items() if trained is not None and k.split("/")[0] not in trained}
        trainable = {k: v for k, v in placed.items() if k not in frozen}
        run = jax.jit(functools.partial(gradients, model=tiny.model(), stage=tiny.stage(optim=optim)))
        rows, drawn = shard_batch(batch, mesh), jax.device_put(keys, replicated(mesh))
        with jax.set_mesh(mesh):
            grads, metrics = run(trainable, frozen, rows, drawn)
        loss, expected_metrics, expected = packed_result
        assert metrics.keys() == expected_metrics.keys() >= {"loss_lm", "loss_vm", "token_accuracy"}
        for name, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose((metrics["loss_lm"] + 10 * metrics["loss_vm"]) / 11, loss, rtol=1e-5)
        assert_same_gradients(grads, {k: v for k, v in expected.items() if k in trainable})

    return check


@pytest.mark.parametrize(("mesh", "optim"), CASES.values(), ids=CASES)
def test_loss_and_gradients(mesh, optim, check_step):
    check_step(mesh, None, optim)


@pytest.mark.parametrize(("mesh", "trained", "optim"), FROZEN.values(), ids=FROZEN)
def test_loss_and_gradients_with_frozen_towers(mesh, trained, optim, check_step):
    check_step(mesh, trained, optim)


def test_a_tower_kept_whole_need_not_divide_fsdp(devices):
    """A float32 frozen table is cast and gathered once per step, and never sliced in between."""
    mesh, model = (
        make_mesh(MeshConfig(data=1, fsdp=8), devices),
        DreamLLMModule(tiny.config(dtype="bfloat16")),
    )
    frozen = {"unet/mid_block/resnets_0/conv1/kernel": jax.ShapeDtypeStruct((3, 3, 6, 6), np.float32)}
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda p: cast_for_compute(p, model, gathered=True, sliced=False), frozen)
        with pytest.raises(ValueError, match="dimension . is not divisible"):
            jax.eval_shape(lambda p: cast_for_compute(p, model, gathered=True), frozen)
    assert shapes["unet/mid_block/resnets_0/conv1/kernel"].dtype == model.config.dtype


@pytest.mark.parametrize("name", ["8 fsdp", "2x2x2", "8 tensor"])
def test_every_device_holds_its_part_alone(name, devices, params):
    mesh = make_mesh(CASES[name][0], devices)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    shardings = parameter_shardings(params, mesh)
    held = sum(np.prod(shardings[k].shard_shape(v.shape)) for k, v in params.items())
    assert held < 1.5 / split * sum(v.size for v in params.values())
