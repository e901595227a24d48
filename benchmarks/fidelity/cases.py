"""The cases, each at its published shape, and the bounds of their errors.

Two processes measure a case, one after the other, so that only one framework is in memory. `theirs` creates a
PyTorch model with random weights, saves it in the format in which it would be published, and records what it
computes. `ours` loads that folder and computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.presets import SD_15, SD_21, SDXL_BASE, VICUNA_7B_V15

# The largest errors allowed.
#   output: absolute difference, of values scaled to a root mean square of 1
#   gradient: norm of the difference, divided by the norm
#   bfloat16: our error in bfloat16 (against float32), divided by PyTorch's. Both round at the same points but
#     sum in a different order, so the two errors are similar but not equal.
BOUNDS = {"output": 1e-4, "gradient": 1e-4, "bfloat16": 1.25}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to compare. `settings` are the arguments of the Hugging Face config for its `kind`."""

    name: str
    kind: str
    description: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def settings(config: Any) -> dict[str, Any]:
    """Returns a tower's options for the library's config; None leaves an option to the library."""
    return {name: value for name, value in to_dict(config).items() if value is not None}


# LLaMA 2's shape with two layers, which cover every operation.
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


def random_normal(*shape: int, seed: int) -> np.ndarray:
    """Returns normally distributed float32 numbers, the same on both sides for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
