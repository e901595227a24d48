"""The train steps of `beside_torch --size=full` as a recipe, to be compiled for GPUs that are not attached:

dreamllm compile --config=benchmarks/recipe.py:stage1 --topology=h200:1
dreamllm compile --config=benchmarks/recipe.py:stage2 --topology=h200:1
"""

from __future__ import annotations

from typing import cast

from ml_collections import ConfigDict

from benchmarks.beside_torch.sizes import SIZES, Training
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import MeshConfig, Recipe


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe of `stage1` (the connectors) or `stage2` (the language model too)."""
    size = SIZES["full"]("bfloat16")
    stage = size.stage(cast(Training, arg or "stage1"))
    return to_config_dict(
        Recipe(name="beside_torch", model=size.model, stages=(stage,), mesh=MeshConfig(fsdp=1))
    )
