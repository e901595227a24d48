"""What is compared at its published shape, and how errors are counted.

A case is measured by two processes, one framework at a time in memory: `theirs` makes a model of PyTorch's
with random weights, saves it as it would be published and writes down what it computes; `ours` loads that
folder and computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.presets import SD_15, SD_21, SDXL_BASE, VICUNA_7B_V15

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


def settings(config: Any) -> dict[str, Any]:
    """Returns a tower's options for the library's config; None leaves an option to the library."""
    return {name: value for name, value in to_dict(config).items() if value is not None}


# LLaMA 2's width; two layers of it show every operation.
_LLAMA = settings(dataclasses.replace(VICUNA_7B_V15, num_hidden_layers=2)) | {"max_position_embeddings": 2048}
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

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
        Case("sd15", "unet", "Stable Diffusion 1.5: U-Net and VAE", settings(SD_15.unet)),
        Case("sd21", "unet", "Stable Diffusion 2.1: U-Net and VAE", settings(SD_21.unet)),
        Case("sdxl", "unet", "SDXL: U-Net and VAE", settings(SDXL_BASE.unet)),
    )
}


def numbers(*shape: int, seed: int) -> np.ndarray:
    """Normal random float32 numbers that both sides draw alike."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
