"""The joint step with SDXL's added conditions: the pooled embedding and the sizes of each dream."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.data.packing import assemble_batch
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.sharding import make_mesh, parameter_shardings, replicated, shard_batch
from dreamllm_jax.train.step import gradients
from tests.train import tiny

POOLED = 16
UNET = tiny.MODEL["unet"] | tiny.SDXL_CONDITIONS
CONFIG = tiny.config(unet=UNET)
GLOBAL = "global_projector/linear_0/kernel"


@pytest.fixture(scope="module")
def sdxl_params():
    return tiny.random_params(CONFIG)


@pytest.fixture(scope="module")
def sdxl_batch(documents):
    layout = dataclasses.replace(tiny.LAYOUT, dream_sizes=True)
    return assemble_batch(tiny.rows_of(documents), layout, tiny.SPECIAL)


@pytest.fixture(scope="module")
def run():
    return jax.jit(functools.partial(gradients, model=DreamLLMModule(CONFIG), stage=tiny.stage()))


@pytest.fixture(scope="module")
def alone(run, sdxl_params, sdxl_batch, keys):
    return jax.tree.map(np.asarray, run(sdxl_params, {}, sdxl_batch, keys))


def test_the_pooled_condition_is_learned(alone, sdxl_params):
    grads, metrics = alone
    assert sdxl_params[GLOBAL].shape == (CONFIG.llama.hidden_size, POOLED)
    assert grads.keys() == sdxl_params.keys()
    # It counts beside the other way from the queries to the U-Net.
    norms = [np.linalg.norm(grads[k]) for k in (GLOBAL, "condition_projector/linear_0/kernel")]
    assert norms[0] > 0.01 * norms[1] > 0
    assert np.isfinite(metrics["loss_vm"])


def test_sizes_of_the_pictures_condition_them(run, alone, sdxl_params, sdxl_batch, keys):
    sizes = sdxl_batch.dream_sizes
    there = sizes[sdxl_batch.dream_mask]
    np.testing.assert_array_equal(there[:, :2], 20)  # what tiny.documents draws
    np.testing.assert_array_equal(there[:, 4:], tiny.LAYOUT.dream_size)
    other = dataclasses.replace(sdxl_batch, dream_sizes=sizes + 100)
    changed = run(sdxl_params, {}, other, keys)[1]
    assert abs(changed["loss_vm"] - alone[1]["loss_vm"]) > 1e-3 * alone[1]["loss_vm"]
    np.testing.assert_allclose(changed["loss_lm"], alone[1]["loss_lm"], rtol=1e-6)
    # Sizes of empty dream slots change nothing.
    absent = np.where(sdxl_batch.dream_mask[..., None], sizes, 77)
    same = run(sdxl_params, {}, dataclasses.replace(sdxl_batch, dream_sizes=absent), keys)[1]
    np.testing.assert_allclose(same["loss_vm"], alone[1]["loss_vm"], rtol=1e-6)


def test_meshes_agree(run, alone, sdxl_params, sdxl_batch, keys, devices, assert_same_gradients):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    shardings = parameter_shardings(sdxl_params, mesh)
    placed = {k: jax.device_put(v, shardings[k]) for k, v in sdxl_params.items()}
    with jax.set_mesh(mesh):
        result = run(placed, {}, shard_batch(sdxl_batch, mesh), jax.device_put(keys, replicated(mesh)))
    grads, metrics = jax.tree.map(np.asarray, result)
    for name, value in alone[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert_same_gradients(grads, alone[0])
