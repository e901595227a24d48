"""What the recipes share: the 7B model of the paper, its optimizer and mesh, and where the data is.

This file is not a recipe. A recipe calls these functions and says what differs.

Recipes read and write below one folder: the current one, or the recipe's argument
(`--config=configs/stage2.py:/mnt/all`):

    models/dreamllm-7b-start   Vicuna, CLIP and Stable Diffusion, converted and composed
    models/...                 the start of a stage: the folder `model` that the stage before it wrote
    data/...                   the data that each recipe lists

Batches: a published batch holds 1,024 documents, each padded to a row of its own. Here rows are packed, so
`batch_size` is chosen for about 1,024 documents a step, and the published steps and learning rates apply
unchanged. Only where documents fill their rows (stage II) are there 1,024 rows of 2,048 tokens.
"""

import dataclasses

from dreamllm_jax.config.data import DataConfig, SourceConfig
from dreamllm_jax.config.model import (
    AttentionConfig,
    DreamLLMConfig,
    GenerationConfig,
    RematConfig,
)
from dreamllm_jax.config.presets import CLIP_L14, SD_21_BASE, VICUNA_7B, ImageDecoder
from dreamllm_jax.config.towers import LlamaConfig, ProjectorConfig
from dreamllm_jax.config.train import (
    LossConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    StageConfig,
    TokenizerConfig,
)

LENGTH = 2048
SPECIAL_TOKENS = 8
CONNECTORS = ("vision_projector", "dream_queries", "condition_projector")
LINEAR, MLP = ProjectorConfig("linear"), ProjectorConfig("mlp", depth=2)
GENERATION = GenerationConfig()
# Weights are sharded over 16 neighbours and replicated over the rest of the devices. 16 chips form a ring or
# a plane of a TPU's torus; along a longer axis XLA all-reduces whole gradients instead of scattering them.
# The frozen image towers (2.5 GB) are replicated and never gathered. On fewer devices:
# `--config.mesh.fsdp=8`.
MESH = MeshConfig(data=-1, fsdp=16, replicated=("unet", "vae", "vision"))


def with_special_tokens(llama: LlamaConfig) -> LlamaConfig:
    """Returns the language model with DreamLLM's special tokens as further rows of its vocabulary."""
    return dataclasses.replace(llama, vocab_size=llama.vocab_size + SPECIAL_TOKENS)


def model(
    llama: LlamaConfig = VICUNA_7B,
    decoder: ImageDecoder = SD_21_BASE,
    vision_projector: ProjectorConfig = LINEAR,
) -> DreamLLMConfig:
    """Returns the paper's model: CLIP ViT-L/14, linear connectors and 64 dream queries, in bfloat16."""
    return DreamLLMConfig(
        llama=with_special_tokens(llama),
        vision=CLIP_L14,
        vision_projector=vision_projector,
        vision_select_layer=-2,
        num_dream_queries=64,
        condition_projector=ProjectorConfig("linear", bias=False),
        unet=decoder.unet,
        vae=decoder.vae,
        schedule=decoder.schedule,
        image_size=decoder.image_size,
        dtype="bfloat16",
        remat=RematConfig(llama="full", vision="full", unet="full"),
        # "lean" saves memory: XLA would hold the scores of whole rows and images, on TPUs in float32. See
        # `python -m benchmarks.kernels --size=full --topology=v5e:2x2`.
        attention=AttentionConfig(llama="lean", unet="lean", vae="lean"),
    )


def optim(learning_rate: float, warmup_ratio: float = 0.003, grad_accum_steps: int = 1) -> OptimConfig:
    """Returns the reference's AdamW: the Hugging Face trainer's defaults, warm-up, then a cosine."""
    return OptimConfig(
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        schedule="cosine",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        grad_accum_steps=grad_accum_steps,
    )


def loss(lm: float, vm: float) -> LossConfig:
    """Returns the joint loss with these weights of text and images."""
    return LossConfig(weight_lm=lm, weight_vm=vm)


def recipe(
    name: str,
    stages: tuple[StageConfig, ...],
    start: str,
    root: str | None,
    model: DreamLLMConfig,
    mesh: MeshConfig = MESH,
    generation: GenerationConfig = GENERATION,
) -> Recipe:
    """Returns a recipe that takes its first weights and its tokenizer from `root/models/<start>`."""
    folder = f"{root or '.'}/models/{start}"
    return Recipe(
        name=name,
        model=model,
        stages=stages,
        init_from=folder,
        tokenizer=TokenizerConfig(path=folder),
        mesh=mesh,
        generation=generation,
        frozen_dtype="bfloat16",
        checkpoint_every=500,
    )


def creation_stage(sources: tuple[SourceConfig, ...], trainable: tuple[str, ...]) -> StageConfig:
    """Returns the second half of stage I, for any image decoder: 30M captions, each used once."""
    return StageConfig(
        name="stage1_creation",
        trainable=trainable,
        steps=29_000,
        # A pair is about 90 tokens; 8 a row leave room for long captions.
        data=DataConfig(
            sources=sources, mode="creation", batch_size=128, length=LENGTH // 2, max_images=0, max_dreams=8
        ),
        loss=loss(lm=0.0, vm=1.0),
        optim=optim(2e-3),
    )


# Data. Weights are documents, in millions; only their ratio matters.


def blip_laion(root: str | None, weight: float) -> SourceConfig:
    return SourceConfig("pairs", f"{root or '.'}/data/blip-laion/*.tar", weight=weight)


def laion400m(root: str | None, weight: float) -> SourceConfig:
    return SourceConfig("pairs", f"{root or '.'}/data/laion400m/*.tar", weight=weight)


def laion_coco(root: str | None, weight: float) -> SourceConfig:
    return SourceConfig("pairs", f"{root or '.'}/data/laion-coco/*.tar", weight=weight)


def llava_pretrain(root: str | None, weight: float) -> SourceConfig:
    folder = f"{root or '.'}/data/llava-pretrain"
    return SourceConfig(
        "conversations",
        f"{folder}/blip_laion_cc_sbu_558k.json",
        weight=weight,
        options=dict(images=f"{folder}/images"),
    )


def mmc4(root: str | None, weight: float) -> SourceConfig:
    folder = f"{root or '.'}/data/mmc4-core"
    return SourceConfig(
        "interleaved",
        f"{folder}/*.jsonl",
        weight=weight,
        options=dict(images=f"{folder}/images", min_similarity=0.25),
    )


def conversations(root: str | None, name: str, weight: float, files: str = "*.json") -> SourceConfig:
    folder = f"{root or '.'}/data/{name}"
    images = dict(images=f"{folder}/images")
    return SourceConfig("conversations", f"{folder}/{files}", weight=weight, options=images)


def instruct_mmc4(root: str | None, weight: float) -> SourceConfig:
    return SourceConfig(
        "instructions",
        f"{root or '.'}/data/instruct-mmc4/*.json",
        weight=weight,
        options=dict(images=f"{root or '.'}/data/mmc4-core/images"),
    )
