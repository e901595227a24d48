"""The sizes: `tiny` for two CPU cores, `full` (the 7B system) for one GPU, `smallest` for the tests."""

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
    """A model and the sizes of the work that is timed on it.

    Attributes:
      rows: The documents in a train step, one in each row.
      length: The tokens in a row. Each document has one image to read and one to generate.
      prompt: The tokens in a prompt.
      new_tokens: The tokens that are decoded after it.
      batch: The batch size for prefill and decoding; they are also timed with one row.
      num_images: The images that are generated in one batch.
      steps: The denoising steps.
      training: The stages whose train step is timed.
      optim: The optimizer of the train step.
      exclusive: The stages whose two train states do not fit on the device together. The sides are created,
        timed and freed one after the other.
    """

    name: str
    model: DreamLLMConfig
    rows: int
    length: int
    prompt: int
    new_tokens: int
    batch: int
    num_images: int
    steps: int
    training: tuple[Training, ...] = ("stage2",)
    optim: OptimConfig = OptimConfig()
    exclusive: tuple[Training, ...] = ()

    def stage(self, training: Training) -> StageConfig:
        """Returns a joint stage that trains the connectors (stage1), and the language model too (stage2)."""
        trainable = CONNECTORS if training == "stage1" else ("llama", *CONNECTORS)
        data: Any = dict(batch_size=self.rows, length=self.length, max_images=1, max_dreams=1)
        base = dict(name=training, trainable=trainable, steps=100, data=data, optim=self.optim)
        return build(StageConfig, base)

    @property
    def generation(self) -> GenerationConfig:
        """Returns greedy decoding, and DDIM with classifier-free guidance."""
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
    """Returns the 7B system of the recipes: Vicuna-7B, CLIP ViT-L/14 and Stable Diffusion 2.1-base."""
    model = DreamLLMConfig(
        llama=dataclasses.replace(VICUNA_7B, vocab_size=32008),
        vision=CLIP_L14,
        unet=SD_21_BASE.unet,
        vae=SD_21_BASE.vae,
        schedule=SD_21_BASE.schedule,
        dtype=dtype,
        remat=RematConfig(llama="dots"),
    )
    optim = OptimConfig(optimizer="adafactor", mu_dtype="bfloat16")
    stages: dict[str, Any] = dict(training=("stage1", "stage2"), exclusive=("stage2",), optim=optim)
    return Size("full", model, 4, 2048, 1024, 128, 8, 4, 25, **stages)


def _smallest(dtype: Dtype) -> Size:
    """Returns the size for the tests: every kind of layer, as small as possible."""
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
    """Returns the size with this name; its model computes in `dtype`."""
    return SIZES[name](dtype)
