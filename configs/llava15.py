"""LLaVA-1.5 7B: the same system without an image decoder.

Reproduces: arXiv 2310.03744: Vicuna-7B v1.5, CLIP ViT-L/14 at 336 px, an mlp projector of depth 2, trained on
558K captions (projector alone, batch 256, 1e-3) and then 665K conversations (with the language model, batch
128, 2e-5), each once. (The reference's projects/llava have 2e-3, 4e-5 and CLIP at 224 px.) Images stand
between `<im_start>` and `<im_end>`, as everywhere in this project; LLaVA's own rows have no such markers.
Hardware, time: the authors' README gives 3.5 and 10 hours on 8 A100;
launch/README.md has bounds for TPUs; not yet measured here.
Command: python -m dreamllm_jax.train --config=configs/llava15.py --workdir=runs/llava15

Starts from models/llava-7b-start: Vicuna and CLIP, converted and composed. LLaVA-1.5's conversations and
images are expected in data/llava-1.5-instruct.
"""

import dataclasses

from common import (
    LENGTH,
    MESH,
    MLP,
    conversations,
    llava_pretrain,
    loss,
    optim,
    recipe,
    with_special_tokens,
)
from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig, RematConfig
from dreamllm_jax.config.presets import CLIP_L14_336, VICUNA_7B_V15
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.train import StageConfig


def model() -> DreamLLMConfig:
    """Returns LLaVA-1.5: a language model that sees and does not draw."""
    return DreamLLMConfig(
        llama=with_special_tokens(VICUNA_7B_V15),
        vision=CLIP_L14_336,
        vision_projector=MLP,
        vision_select_layer=-2,
        dtype="bfloat16",
        remat=RematConfig(llama="full", vision="full"),
    )


def stages(root: str | None) -> tuple[StageConfig, ...]:
    """Returns alignment of the projector, then instruction tuning."""
    instruct = conversations(root, "llava-1.5-instruct", 1.0, files="llava_v1_5_mix665k.json")
    return (
        StageConfig(
            name="align",
            trainable=("vision_projector",),
            steps=2_181,
            # 256 captions: two a row, each about 680 tokens.
            data=DataConfig(
                sources=(llava_pretrain(root, 1.0),),
                mode="comprehension",
                batch_size=128,
                length=1408,
                max_images=2,
                max_dreams=0,
            ),
            loss=loss(lm=1.0, vm=0.0),
            optim=optim(1e-3, warmup_ratio=0.03),
        ),
        StageConfig(
            name="instruct",
            trainable=("llama", "vision_projector"),
            steps=5_198,
            # About 128 conversations: two a row.
            data=DataConfig(
                sources=(instruct,),
                mode="comprehension",
                batch_size=64,
                length=LENGTH,
                max_images=3,
                max_dreams=0,
            ),
            loss=loss(lm=1.0, vm=0.0),
            optim=optim(2e-5, warmup_ratio=0.03),
        ),
    )


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; arg: the folder of models and data (default: the current one)."""
    return to_config_dict(
        recipe(
            "llava15",
            stages(arg),
            "llava-7b-start",
            arg,
            model(),
            mesh=dataclasses.replace(MESH, replicated=("vision",)),
            generation=GenerationConfig(template="vicuna_v1.1"),
        )
    )
