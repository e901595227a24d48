"""Stage I, first half: the vision projector learns to describe what CLIP sees; everything else is frozen.

Reproduces: arXiv 2309.11499, stage I, comprehension: 30M pairs once (LLaVA-Pretrain 558K, BLIP-LAION 8M,
LAION400M 11M, LAION-COCO 11M), batch 1024, learning rate 2e-3. (The released config takes 20M of each of the
three, and GQA instead of LLaVA-Pretrain.)
Hardware, time: the paper gives 6 hours on 128 A800 for the whole of stage I;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage1_comprehension.py --workdir=runs/comprehension

Starts from models/dreamllm-7b-start (see common.py). Move the result, `stages/0_stage1_comprehension/model`
in the work folder, to models/dreamllm-7b-stage1-comprehension: stage1_creation.py starts from it.
"""

from common import blip_laion, laion400m, laion_coco, llava_pretrain, loss, model, optim, recipe
from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import StageConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    sources = (
        llava_pretrain(arg, 0.558),
        blip_laion(arg, 8.0),
        laion400m(arg, 11.0),
        laion_coco(arg, 11.0),
    )
    stage = StageConfig(
        name="stage1_comprehension",
        trainable=("vision_projector",),
        steps=29_000,
        # A pair is about 280 tokens: 8 a row. A row may be longer than any one document (2,048).
        data=DataConfig(
            sources=sources,
            mode="comprehension",
            batch_size=128,
            length=2304,
            max_images=8,
            max_dreams=0,
        ),
        loss=loss(lm=1.0, vm=0.0),
        optim=optim(2e-3),
    )
    return to_config_dict(recipe("stage1_comprehension", (stage,), "dreamllm-7b-start", arg, model()))
