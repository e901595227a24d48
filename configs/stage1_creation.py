"""Stage I, second half: queries and condition projector learn to ask the frozen U-Net for images.

Reproduces: arXiv 2309.11499, stage I, creation: 30M pairs once (BLIP-LAION, LAION400M, LAION-COCO; the
released config has 20M of each), batch 1024, learning rate 2e-3, image loss alone.
Hardware, time: the paper gives 6 hours on 128 A800 for the whole of stage I;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage1_creation.py --workdir=runs/creation

The two halves share no trained parameter and no gradient. The reference trains them apart and merges the
files; here this one begins with the other's result, models/dreamllm-7b-stage1-comprehension, and there is
nothing to merge. Put the result at models/dreamllm-7b-stage1: stage2.py begins with it.
"""

from base_7b import blip_laion, creation_stage, laion400m, laion_coco, recipe
from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """The recipe; arg: the folder of models and data (default: the current one)."""
    sources = (blip_laion(arg, 1.0), laion400m(arg, 1.0), laion_coco(arg, 1.0))
    stage = creation_stage(sources, ("dream_queries", "condition_projector"))
    return ConfigDict(recipe("stage1_creation", [stage], "dreamllm-7b-stage1-comprehension", arg))
