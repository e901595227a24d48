"""A small DreamLLM on real handwritten digits: everything the 7B system does, in minutes.

Reproduces: the whole method of arXiv 2309.11499 on scikit-learn's 1,797 digits. Stage 0 trains what the
real system downloads (VAE, CLIP, text-conditioned U-Net, language model); stages I, II and III train what
the real ones train, with the joint loss 1 : 10 of the real stage II. What is not as at 7B, besides sizes:
  - the vision projector has two layers, as in LLaVA-1.5: with one, even training pictures are read less well;
  - stage I has documents too, beside pairs and questions;
  - the language model's own text (`words.py`) has stories in the layout of those with images, with words in
    the slots, and sums beyond the digits. The language model thus knows what a query has to express before
    the first query is trained. Stages II and III keep some of that text, so that arithmetic is not lost;
  - empty prompts (condition dropout, for guidance), noisy timesteps preferred, weight decay (2.0
    where the language model is trained), and rates, warm-up (5 %) and b2 for a model of a million weights.
    As at 7B, stages II and III are far gentler than I: at three times these rates the rule of addition, which
    the language model brings along, is lost to the few sums that are drawn.
Hardware: two CPU cores, 4 GiB. Time: `launch/quickstart.sh` measures it, into metrics.json.
Command: python -m dreamllm_jax.train --config=examples/handwriting/config.py --workdir=quickstart
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.recipe_files import to_config_dict
from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)
from dreamllm_jax.config.train import (
    LossConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    StageConfig,
    TokenizerConfig,
)

VOCABULARY = 512
SOURCE = "examples.handwriting.source:Handwriting"
# Wherever the language model is trained: so strong that addition becomes a rule rather than a list of sums.
DECAY = 2.0


def model() -> DreamLLMConfig:
    """Returns every tower of the 7B system, each small."""
    return DreamLLMConfig(
        llama=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=384,
        ),
        vision=ClipVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            projection_dim=64,
        ),
        vision_projector=ProjectorConfig("mlp", depth=2),
        vision_select_layer=-2,
        num_dream_queries=4,
        condition_projector=ProjectorConfig("linear", bias=False),
        unet=UNetConfig(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        vae=VaeConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16),
        schedule=ScheduleConfig(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        text=ClipTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=64,
            eos_token_id=2,  # as in old CLIP configs: the highest id, here the padding after </s>
        ),
        contrastive=True,
        image_size=16,
    )


def optim(rate: float, weight_decay: float = 0.01, ema_decay: float = 0.0) -> OptimConfig:
    """Returns AdamW for a model of a million weights."""
    return OptimConfig(
        learning_rate=rate, warmup_ratio=0.05, weight_decay=weight_decay, b2=0.99, ema_decay=ema_decay
    )


def captions(batch_size: int, **options: Any) -> DataConfig:
    """Returns the data that the towers are pretrained on: one captioned picture per row."""
    options = dict(kinds=dict(captions=1.0)) | options
    return DataConfig(
        source=SOURCE,
        source_options=options,
        batch_size=batch_size,
        length=16,
        max_images=1,
        max_dreams=1,
    )


def packed(batch_size: int, **kinds: float) -> DataConfig:
    """Returns data of these kinds of documents and weights, packed into rows."""
    return DataConfig(
        source=SOURCE,
        source_options=dict(kinds=kinds),
        batch_size=batch_size,
        length=128,
        max_images=9,
        max_dreams=9,
    )


def mixed(**kinds: float) -> DataConfig:
    """Returns packed rows with room for fewer drawings: text and questions, which have none, share them."""
    return dataclasses.replace(packed(8, **kinds), max_dreams=6)


def stage0() -> list[StageConfig]:
    """Returns the stages that stand in for what the real system downloads."""
    text_only = dataclasses.replace(packed(8, text=1.0), max_images=0, max_dreams=0)
    return [
        StageConfig(
            name="stage0_vae",
            objective="vae",
            trainable=("vae",),
            steps=250,
            data=captions(64),
            loss=LossConfig(kl_weight=1e-4),
            optim=optim(2e-3),
        ),
        StageConfig(
            name="stage0_clip",
            objective="contrastive",
            trainable=("vision", "text", "contrastive"),
            steps=400,
            data=captions(128),
            optim=optim(1e-3),
        ),
        StageConfig(
            name="stage0_unet",
            objective="diffusion",
            trainable=("unet",),
            steps=400,
            data=captions(64, caption_dropout=0.1),
            optim=optim(2e-3, ema_decay=0.995),
        ),
        StageConfig(
            name="stage0_language",
            trainable=("llama",),
            steps=2200,
            data=text_only,
            loss=LossConfig(weight_lm=1.0, weight_vm=0.0),
            optim=optim(2e-3, DECAY),
        ),
    ]


def dream_stages() -> list[StageConfig]:
    """Returns DreamLLM's own three stages."""
    drawing = ("dream_queries", "condition_projector")
    everything = ("llama", "vision_projector", *drawing)
    joint = LossConfig(weight_lm=1.0, weight_vm=10.0, condition_dropout=0.1, timestep_sampling="cubic")
    reading = dataclasses.replace(
        packed(16, pairs=0.4, conversations=0.4, documents=0.2),
        mode="comprehension",
        max_images=16,
        max_dreams=0,
    )
    return [
        StageConfig(
            name="stage1_comprehension",
            trainable=("vision_projector",),
            steps=400,
            data=reading,
            loss=LossConfig(weight_lm=1.0, weight_vm=0.0),
            optim=optim(3e-3),
        ),
        StageConfig(
            name="stage1_creation",
            trainable=drawing,
            steps=260,
            data=packed(8, documents=0.7, pairs=0.3),
            loss=dataclasses.replace(joint, weight_lm=0.0, weight_vm=1.0),
            optim=optim(2e-3),
        ),
        StageConfig(
            name="stage2",
            trainable=everything,
            steps=500,
            data=mixed(documents=0.45, pairs=0.15, conversations=0.1, text=0.3),
            loss=joint,
            optim=optim(1e-4, DECAY),
        ),
        StageConfig(
            name="stage3",
            trainable=everything,
            steps=200,
            data=mixed(documents=0.3, pairs=0.05, conversations=0.45, text=0.2),
            loss=joint,
            optim=optim(5e-5, DECAY),
        ),
    ]


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the recipe; with arg "tiny", a few steps of each stage (to try the machinery, not to learn)."""
    if arg not in (None, "tiny"):
        raise ValueError(f"examples/handwriting/config.py has no variant {arg!r}; omit it, or use 'tiny'.")
    stages = [*stage0(), *dream_stages()]
    if arg == "tiny":
        stages = [dataclasses.replace(stage, steps=4) for stage in stages]
    recipe = Recipe(
        name="handwriting",
        model=model(),
        stages=tuple(stages),
        tokenizer=TokenizerConfig(corpus="examples.handwriting.words:corpus_text", vocab_size=VOCABULARY),
        generation=GenerationConfig(
            max_new_tokens=32,
            max_images=7,
            num_inference_steps=12,
            guidance_scale=3.0,
            sampler="dpmpp_2m",
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        frozen_dtype="float32",
        checkpoint_every=200,
    )
    return to_config_dict(recipe)
