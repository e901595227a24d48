"""The whole system with Vicuna-13B: stages I, II and III in one run.

Reproduces: nothing published; the stages of the 7B recipes, unchanged, on Vicuna-13B v1.1, with the data
where those recipes expect it.
Hardware, time: a v5p:4x4x4 holds it (launch/README.md has the bounds); not yet measured.
Command: python -m dreamllm_jax.train --config=configs/dreamllm_13b.py --workdir=runs/13b

Starts from models/dreamllm-13b-start: Vicuna, CLIP and Stable Diffusion, converted and composed. Each stage
starts from the result of the one before it.
"""

import stage1_comprehension
import stage1_creation
import stage2
import stage3
from common import model, recipe
from ml_collections import ConfigDict

from dreamllm_jax.config.presets import VICUNA_13B
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import build_recipe


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    files = (stage1_comprehension, stage1_creation, stage2, stage3)
    recipes = [build_recipe(file.get_config(arg)) for file in files]
    stages = tuple(stage for one in recipes for stage in one.stages)
    return to_config_dict(
        recipe(
            "dreamllm_13b",
            stages,
            "dreamllm-13b-start",
            arg,
            model(llama=VICUNA_13B),
            generation=recipes[-1].generation,
        )
    )
