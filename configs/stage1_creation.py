"""Stage I, second half: dream queries and condition projector learn to condition the frozen U-Net.

Reproduces: arXiv 2309.11499, stage I, creation: 30M pairs once (BLIP-LAION, LAION400M, LAION-COCO; the
released config has 20M of each), batch 1024, learning rate 2e-3, image loss alone.
Hardware, time: the paper gives 6 hours on 128 A800 for the whole of stage I;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage1_creation.py --workdir=runs/creation

The two halves share no trained parameter and no gradient. The reference trains them separately and merges the
files. Here this half starts from the result of the other, models/dreamllm-7b-stage1-comprehension, so nothing
has to be merged. Move the result to models/dreamllm-7b-stage1: stage2.py starts from it.
"""

from common import blip_laion, creation_stage, laion400m, laion_coco, model, recipe
from ml_collections import ConfigDict

from dreamllm_jax.config.recipe_files import to_config_dict


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    sources = (blip_laion(arg, 1.0), laion400m(arg, 1.0), laion_coco(arg, 1.0))
    stage = creation_stage(sources, ("dream_queries", "condition_projector"))
    start = "dreamllm-7b-stage1-comprehension"
    return to_config_dict(recipe("stage1_creation", (stage,), start, arg, model()))
