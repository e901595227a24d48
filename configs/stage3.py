"""Stage III: instruction tuning on conversations, instructed documents and pairs.

Reproduces: arXiv 2309.11499, stage III: LLaVA-instruct 80K, InstructMMC4 20K, Instruct-BLIP-LAION 20K, three
epochs, batch 1024 x 2048, learning rate 4e-5, losses 1 and 10.
Argument `released` (`:released` or `:FOLDER,released`) takes the data of the released config: LLaVA-1.5's
665K conversations, 600K pairs of BLIP-LAION, InstructMMC4 20K, once.
Hardware, time: the paper gives 1.5 hours on 128 A800;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/stage3.py --workdir=runs/stage3

Starts from models/dreamllm-7b-stage2; the result is DreamLLM-7B. Instruct-BLIP-LAION is expected as
conversations whose answers hold `<dream>`. The paper's files of it and of InstructMMC4 were not published.
"""

from common import (
    CONNECTORS,
    LENGTH,
    blip_laion,
    conversations,
    instruct_mmc4,
    loss,
    model,
    optim,
    recipe,
)
from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import StageConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: a folder of models and data (default: the current one), `released` or both."""
    released = arg is not None and arg.split(",")[-1] == "released"
    root = (arg or "").removesuffix("released").removesuffix(",") if released else arg
    if released:
        sources = (
            conversations(root, "llava-1.5-instruct", 0.665298),
            blip_laion(root, 0.6),
            instruct_mmc4(root, 0.020231),
        )
    else:
        sources = (
            conversations(root, "llava-instruct", 0.08),
            instruct_mmc4(root, 0.02),
            conversations(root, "instruct-blip-laion", 0.02),
        )
    stage = StageConfig(
        name="stage3",
        trainable=("llama", *CONNECTORS),
        steps=1_256 if released else 350,
        # About three documents a row.
        data=DataConfig(
            sources=sources, mode="joint", batch_size=384, length=LENGTH, max_images=6, max_dreams=6
        ),
        loss=loss(lm=1.0, vm=10.0),
        optim=optim(4e-5),
    )
    generation = GenerationConfig(template="vicuna_v1.1", guidance_scale=7.5)
    return to_config_dict(
        recipe("stage3", (stage,), "dreamllm-7b-stage2", root, model(), generation=generation)
    )
