"""What is compared at its published shape, and how errors are counted.

A case is measured by two processes, one framework at a time in memory: `theirs` makes a model of PyTorch's
with random weights, saves it as it would be published and writes down what it computes; `ours` loads that
folder and computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Largest errors allowed. Outputs: absolute, of values brought to a root mean square of 1. Gradients: norm of
# the difference by the norm. bfloat16: our distance from float32 by PyTorch's own; both round at the same
# places but add up in another order, so that the two distances are alike and not equal.
BOUNDS = {"output": 1e-4, "gradient": 1e-4, "bfloat16": 1.25}


@dataclasses.dataclass(frozen=True)
class Case:
    """`settings` are those of the Hugging Face config of its kind."""

    name: str
    kind: str
    words: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


# LLaMA-7B's width; two layers of it show every operation.
_LLAMA = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=2,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_SD21 = dict(
    sample_size=96,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
    upcast_attention=True,
)
_SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

CASES = {
    case.name: case
    for case in (
        Case("llama", "llama", "LLaMA-7B, 2 layers, 500 tokens", _LLAMA),
        Case("llama-gqa", "llama", "the same, 8 key-value heads", _LLAMA | {"num_key_value_heads": 8}),
        Case("llama-linear", "llama", "the same, linear RoPE scaling", _LLAMA | {"rope_parameters": _LINEAR}),
        Case(
            "llama-dynamic",
            "llama",
            "the same, dynamic RoPE scaling beyond 256 positions",
            _LLAMA | {"rope_parameters": _DYNAMIC, "max_position_embeddings": 256},
        ),
        Case("clip", "clip", "CLIP ViT-L/14 at 224 pixels, both towers"),
        Case("llava", "llava", "LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, LLaMA-7B with 2 layers", _LLAMA),
        Case(
            "sd15",
            "unet",
            "Stable Diffusion 1.5: U-Net and VAE",
            dict(sample_size=64, cross_attention_dim=768),
        ),
        Case("sd21", "unet", "Stable Diffusion 2.1: U-Net and VAE", _SD21),
        Case("sdxl", "unet", "SDXL: U-Net and VAE", _SDXL),
    )
}

CLIP_TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    projection_dim=768,
)


def clip_vision(image_size: int) -> dict[str, int]:
    """CLIP ViT-L/14 at `image_size` pixels."""
    return dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=768,
    )


def numbers(*shape: int, seed: int) -> np.ndarray:
    """Normal random float32 numbers that both sides draw alike."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
