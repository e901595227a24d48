"""Model FLOPs of single operations, of towers against formulas, and of steps."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipVisionConfig, LlamaConfig
from dreamllm_jax.ops import cpu
from dreamllm_jax.ops.conv import xla_convolution
from dreamllm_jax.train.flops import flops, forward_flops, passes, step_flops
from tests.train import tiny

A, B = jnp.zeros((3, 4)), jnp.zeros((4, 5))


def test_single_operations():
    assert flops(jnp.matmul, A, B) == 2 * 3 * 4 * 5
    assert flops(lambda a, b: jnp.tanh(a) + a, A, A) == 0
    assert flops(jax.jit(jnp.matmul), A, B) == 120
    square = jnp.zeros((4, 4))
    assert flops(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=7)[0], square) == 7 * 128
    assert flops(lambda a: jax.checkpoint(lambda x: x @ x)(a), square) == 128
    assert flops(lambda a: jax.lax.cond(a.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, a), square) == 256
    assert flops(lambda a: jnp.einsum("bij,bjk->bik", a, a), jnp.zeros((2, 3, 3))) == 2 * 2 * 27


@pytest.mark.parametrize("form", [xla_convolution, cpu.convolution])
def test_convolutions(form):
    pixels, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    assert flops(lambda x, k: form(x, k, 1, (1, 1)), pixels, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    assert flops(lambda x, k: form(x, k, 2, (1, 1)), pixels, kernel) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize("heads", [32, 8])
def test_llama_by_its_formula(heads):
    """Two FLOPs per token and weight, and unmasked attention, at 7B's size, without allocation."""
    config = LlamaConfig(num_key_value_heads=heads)
    d, f, layers, rows, length = 4096, 11008, 32, 2, 512
    weights = layers * (2 * d * d + 2 * d * (heads * 128) + 3 * d * f) + d * config.vocab_size
    attention = layers * 4 * length * d
    found = forward_flops(DreamLLMConfig(llama=config), rows, length, 0, 0)
    assert found == {"llama": rows * length * (2 * weights + attention)}


def test_clip_by_its_formula():
    vision = ClipVisionConfig()
    config = DreamLLMConfig(llama=tiny.config().llama, vision=vision)
    n, d, f = vision.num_patches + 1, 1024, 4096
    layer = n * (2 * (4 * d * d + 2 * d * f) + 4 * n * d)
    # the layer after the selected one is not run; patches and the projector are
    rest = 2 * vision.num_patches * (3 * 14 * 14 * d + d * config.llama.hidden_size)
    assert forward_flops(config, 1, 8, 3, 0)["vision"] in [3 * (k * layer + rest) for k in (23, 24)]


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (("vision_projector",), {"llama": 2, "vision": 1, "unet": 2, "vae": 1}),
        (("dream_queries", "condition_projector"), {"llama": 2, "vision": 1, "unet": 2, "vae": 1}),
        (("condition_projector",), {"llama": 1, "vision": 1, "unet": 2, "vae": 1}),
        (("llama/layers/.*/q_proj",), {"llama": 3, "vision": 1, "unet": 2, "vae": 1}),
        ((".*",), {"llama": 3, "vision": 3, "unet": 3, "vae": 3}),
    ],
)
def test_how_often_a_step_passes_a_tower(trainable, expected):
    assert passes(tiny.config(), tiny.stage(trainable=trainable)) == expected


def test_a_step_of_the_tiny_model():
    stage = tiny.stage(data=dict(batch_size=8, length=64, max_images=2, max_dreams=1))
    forward = forward_flops(tiny.config(), 8, 64, 16, 8)
    assert forward.keys() == {"llama", "vision", "unet", "vae"} and min(forward.values()) > 0
    assert step_flops(tiny.config(), stage) == {tower: 3 * n for tower, n in forward.items()}
    assert step_flops(tiny.config(), dataclasses.replace(stage, objective="vae")) == {}
