"""The whole system with Vicuna-13B: stages I, II and III in one run.

Reproduces: nothing published; the stages of the 7B recipes as they are, on Vicuna-13B v1.1. Data lies where
they expect it.
Hardware, time: a v5p:4x4x4 holds it (launch/README.md has the bounds); not yet measured.
Command: python -m dreamllm_jax.train --config=configs/dreamllm_13b.py --workdir=runs/13b

Begins with models/dreamllm-13b-start: Vicuna, CLIP and Stable Diffusion, converted and put together; every
stage begins with the result of the one before it.
"""

import base_7b
import stage1_comprehension
import stage1_creation
import stage2
import stage3
from ml_collections import ConfigDict


def vicuna_13b() -> dict:
    """Vicuna-13B v1.1 (LLaMA)."""
    sizes = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    return base_7b.vicuna() | sizes


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; arg: the folder of models and data (default: the current one)."""
    recipes = [module.get_config(arg) for module in (stage1_comprehension, stage1_creation, stage2, stage3)]
    stages = [stage for recipe in recipes for stage in recipe.to_dict()["stages"]]
    return ConfigDict(
        base_7b.recipe(
            "dreamllm_13b",
            stages,
            "dreamllm-13b-start",
            arg,
            model=base_7b.model() | dict(llama=vicuna_13b()),
            generation=recipes[-1].to_dict()["generation"],
        )
    )
