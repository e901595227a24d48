"""Stage II: the language model learns to read and write documents of text and images.

Reproduces: arXiv 2309.11499, stage II (I-GPT): 2M documents of MMC4-core (images with similarity >= 0.25)
and 2M pairs of BLIP-LAION, batch 1024 x 2048, learning rate 2e-5, losses 1 and 10. (The released config
samples from 7M and 10M.)
Hardware, time: the paper gives 10 hours on 128 A800;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage2.py --workdir=runs/stage2

Starts from models/dreamllm-7b-stage1. Move the result to models/dreamllm-7b-stage2: stage3.py starts from it.
MMC4-core is expected in data/mmc4-core: its jsonl shards unpacked, and its images in the folder `images`.
"""

from common import CONNECTORS, LENGTH, blip_laion, loss, mmc4, model, optim, recipe
from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import StageConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    stage = StageConfig(
        name="stage2",
        trainable=("llama", *CONNECTORS),
        steps=3_900,
        # An image that is dreamed and seen takes 324 tokens: 4 of them and their text fill a row.
        data=DataConfig(
            sources=(mmc4(arg, 2.0), blip_laion(arg, 2.0)),
            mode="joint",
            batch_size=1024,
            length=LENGTH,
            max_images=4,
            max_dreams=4,
        ),
        loss=loss(lm=1.0, vm=10.0),
        optim=optim(2e-5, grad_accum_steps=4),
    )
    return to_config_dict(recipe("stage2", (stage,), "dreamllm-7b-stage1", arg, model()))
