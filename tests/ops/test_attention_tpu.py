"""Attention compiled by the real TPU compiler at published shapes, without a TPU."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from dreamllm_jax.aot.topology import topology_devices
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.models.llama import Llama
from dreamllm_jax.ops.attention import AXES, attention, masks
from dreamllm_jax.sharding import activation_spec, make_mesh


@pytest.fixture(scope="module")
def chips():
    """The four described chips of a `v5p:2x2x1`."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (pip install 'dreamllm-jax[aot]')")
    return topology_devices("v5p:2x2x1")


def abstract_array(mesh, shape, dtype, *axes):
    """An abstract array with the sharding of these logical axes."""
    spec = activation_spec(axes, shape, mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def kernels(text, phase):
    """Returns how often a compiled program calls the splash kernel of this phase."""
    return len(re.findall(rf"%splash_mha_{phase}\S* = .*custom-call\(", text))


@pytest.mark.parametrize(
    ("rows", "shape", "sizes", "held"),
    [
        # LLaMA-7B with its length in two parts; Stable Diffusion 2.1's finest level; the VAE's single head.
        # For the first, libtpu 0.0.42 and 0.0.50 need 42 and 77 MiB with splash, 103 and 131 MiB in chunks.
        ("batch", (2, 2048, 32, 128), MeshConfig(1, 1, 2, 2), 96),
        ("pictures", (8, 4096, 5, 64), MeshConfig(1, 4, 1, 1), 128),
        ("pictures", (4, 4096, 1, 512), MeshConfig(1, 4, 1, 1), 64),
    ],
    ids=["llama", "unet", "vae"],
)
def test_splash_compiles_for_tpus(chips, rows, shape, sizes, held):
    """Forward and backward: no float32 array is as large as the scores, and `held` MiB of memory suffice."""
    mesh = make_mesh(sizes, chips)

    def loss(q, k, v, ids):
        mask = masks.packed(ids) if rows == "batch" else None
        out = attention(q, k, v, mask, implementation="splash", batch_axis=rows)
        return out.astype(jnp.float32).sum()

    x = abstract_array(mesh, shape, jnp.bfloat16, *AXES[rows], "heads", "head_dim")
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(loss, (0, 1, 2)))
        compiled = run.lower(x, x, x, abstract_array(mesh, shape[:2], jnp.int32, *AXES[rows])).compile()
    text = compiled.as_text()
    assert [kernels(text, phase) for phase in ("fwd", "dq", "dkv")] == [1, 1, 1]
    scores = math.prod(shape[:3]) * shape[1] // mesh.size
    found = [math.prod(map(int, size.split(","))) for size in re.findall(r"f32\[([\d,]+)\]", text)]
    assert found and max(found) <= scores // 4
    assert compiled.memory_analysis().temp_size_in_bytes < held << 20


@pytest.mark.parametrize(("remat", "times"), [("minimal", 1), ("full", 2)])
def test_llama_with_splash_and_a_sharded_length(chips, remat, times):
    """Under "minimal" the backward pass does not run the forward kernel again.

    Only keys and values are gathered along the length, not the states that they are computed from.
    """
    mesh = make_mesh(MeshConfig(1, 1, 2, 2), chips)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model, short = Llama(config, jnp.bfloat16, remat, "splash"), jnp.ones((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 512)), short, short)

    def loss(params, x, positions, segment_ids):
        return model.apply(params, x, positions, segment_ids).astype(jnp.float32).sum()

    x = abstract_array(mesh, (2, 512, 512), jnp.bfloat16, "batch", "length", None)
    ids = abstract_array(mesh, (2, 512), jnp.int32, "batch", "length")
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, ids, ids).compile().as_text()
    assert kernels(text, "fwd") == times
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\].* all-gather(?:-start)?\(", text)
    assert "2,512,2,128" in gathered  # the heads of one device
    assert not [shape for shape in gathered if shape.endswith("512,512")]
