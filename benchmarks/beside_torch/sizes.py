"""What is timed: the shapes of `tiny`, for two cores, and of `full`, the 7B system, for one GPU."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dreamllm_jax.config.base import build
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig, RematConfig, model_config
from dreamllm_jax.config.presets import CLIP_L14, SD_21_BASE, VICUNA_7B
from dreamllm_jax.config.train import OptimConfig, StageConfig

Training = Literal["stage1", "stage2"]
Dtype = Literal["float32", "bfloat16"]
CONNECTORS = ("vision_projector", "dream_queries", "condition_projector")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the work that is timed on it.

    A joint step reads `rows` documents of `length` tokens, each with one picture seen and one drawn. Prompts
    have `prompt` tokens, `new_tokens` are written after them, alone and in a batch of `batch`; `pictures` are
    drawn at once in `steps` steps. `training` names the joint steps that are timed; where the states of the
    two sides do not fit the device together, it is named in `apart` too: one is made, timed and freed after
    the other.
    """

    name: str
    model: DreamLLMConfig
    rows: int
    length: int
    prompt: int
    new_tokens: int
    batch: int
    pictures: int
    steps: int
    training: tuple[Training, ...] = ("stage2",)
    optim: OptimConfig = OptimConfig()
    apart: tuple[Training, ...] = ()

    def stage(self, training: Training) -> StageConfig:
        """The joint stage: connectors alone are trained (I), or the language model with them (II)."""
        trainable = CONNECTORS if training == "stage1" else ("llama", *CONNECTORS)
        data: Any = dict(batch_size=self.rows, length=self.length, max_images=1, max_dreams=1)
        base = dict(name=training, trainable=trainable, steps=100, data=data, optim=self.optim)
        return build(StageConfig, base)

    @property
    def generation(self) -> GenerationConfig:
        """Greedy text; DDIM with classifier-free guidance."""
        return GenerationConfig(
            max_new_tokens=self.new_tokens,
            num_inference_steps=self.steps,
            guidance_scale=7.5,
            sampler="ddim",
        )


def _tiny(dtype: Dtype) -> Size:
    model = dict(
        llama=dict(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=512,
        ),
        vision=dict(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=64,
            patch_size=8,
            projection_dim=192,
        ),
        num_dream_queries=16,
        unet=dict(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(64, 128),
            layers_per_block=2,
            cross_attention_dim=192,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        vae=dict(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=32, sample_size=64),
        image_size=64,
        dtype=dtype,
    )
    return Size("tiny", model_config(model), 4, 256, 128, 64, 8, 4, 10)


def _full(dtype: Dtype) -> Size:
    """The 7B system of the recipes: Vicuna-7B, CLIP ViT-L/14 and Stable Diffusion 2.1-base."""
    model = DreamLLMConfig(
        llama=dataclasses.replace(VICUNA_7B, vocab_size=32008),
        vision=CLIP_L14,
        unet=SD_21_BASE.unet,
        vae=SD_21_BASE.vae,
        schedule=SD_21_BASE.schedule,
        dtype=dtype,
        remat=RematConfig(llama="dots"),
    )
    optim = OptimConfig(mu_dtype="bfloat16", second_moment="factored")
    stages = dict(training=("stage1", "stage2"), apart=("stage2",), optim=optim)
    return Size("full", model, 4, 2048, 1024, 128, 8, 4, 25, **stages)


def _smallest(dtype: Dtype) -> Size:
    """For the tests: every operation, in no time."""
    model = dict(
        llama=dict(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=96,
        ),
        vision=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=16,
        ),
        num_dream_queries=4,
        unet=dict(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(16,),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        ),
        vae=dict(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, sample_size=8),
        image_size=8,
        dtype=dtype,
    )
    return Size("smallest", model_config(model), 2, 24, 5, 6, 2, 2, 2)


SIZES = {"tiny": _tiny, "full": _full, "smallest": _smallest}


def make_size(name: str, dtype: Dtype) -> Size:
    """The size of that name, its model computing in `dtype`."""
    return SIZES[name](dtype)
