"""Stage I, creation, with SDXL as the image decoder: 1024 px, pooled and size conditions.

Reproduces: what the reference's projects/dreamllm_sdxl set out to do (its code cannot run as published):
Vicuna-7B v1.5, CLIP with an mlp projector of depth 2, SDXL base 1.0, and a global projector from the mean of
the query states to SDXL's pooled text embedding; LAION400M 20M and BLIP-LAION 10M, batch 1024, 2e-3.
It differs in one number: 64 dream queries, the paper's best, where the reference's config has 196.
Hardware, time: none published;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/sdxl.py --workdir=runs/sdxl

Starts from models/dreamllm-sdxl-7b-start: Vicuna, CLIP and SDXL, converted and composed. The vision projector
is not trained here; stage1_comprehension.py does that, with this model.
"""

from common import MLP, blip_laion, creation_stage, laion400m, model, recipe
from ml_collections import ConfigDict

from dreamllm_jax.config.presets import SDXL_BASE, VICUNA_7B_V15
from dreamllm_jax.config.recipe_files import to_config_dict


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    sources = (laion400m(arg, 20.0), blip_laion(arg, 10.0))
    stage = creation_stage(sources, ("dream_queries", "condition_projector", "global_projector"))
    sdxl = model(llama=VICUNA_7B_V15, decoder=SDXL_BASE, vision_projector=MLP)
    return to_config_dict(recipe("sdxl", (stage,), "dreamllm-sdxl-7b-start", arg, sdxl))
