"""The published towers: one config each, by name and by the id under which the hub has them.

Sources: the `config.json` files of the hub repositories that the tables name. The sizes of LLaMA are in arXiv
2302.13971 (table 2), those of CLIP ViT-L/14 in arXiv 2103.00020 (tables 19 and 20), those of SDXL in arXiv
2307.01952 (table 1).

    >>> DIFFUSION["stabilityai/stable-diffusion-2-1-base"] is SD_21_BASE
    True
    >>> dataclasses.replace(VICUNA_7B, num_hidden_layers=2)  # the same width, two layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)

# Language models. Vicuna v1.1 is LLaMA, v1.5 is LLaMA 2: the same network for longer documents.
VICUNA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
VICUNA_7B_V15 = dataclasses.replace(VICUNA_7B, max_position_embeddings=4096, rms_norm_eps=1e-5)
VICUNA_13B = LlamaConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
VICUNA_13B_V15 = dataclasses.replace(VICUNA_13B, max_position_embeddings=4096, rms_norm_eps=1e-5)
LANGUAGE: Mapping[str, LlamaConfig] = {
    "lmsys/vicuna-7b-v1.1": VICUNA_7B,
    "lmsys/vicuna-7b-v1.5": VICUNA_7B_V15,
    "lmsys/vicuna-13b-v1.1": VICUNA_13B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B_V15,
}

# CLIP. The text tower belongs to both vision towers.
CLIP_L14 = ClipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    projection_dim=768,
)
CLIP_L14_336 = dataclasses.replace(CLIP_L14, image_size=336)
CLIP_L14_TEXT = ClipTextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    projection_dim=768,
)
VISION: Mapping[str, ClipVisionConfig] = {
    "openai/clip-vit-large-patch14": CLIP_L14,
    "openai/clip-vit-large-patch14-336": CLIP_L14_336,
}


@dataclasses.dataclass(frozen=True)
class ImageDecoder:
    """A latent diffusion model: the U-Net, the VAE of its latents and the noise schedule of its training."""

    unet: UNetConfig
    vae: VaeConfig
    schedule: ScheduleConfig

    @property
    def image_size(self) -> int:
        """Height and width of the images that it was trained on, in pixels."""
        return self.vae.sample_size


# All of them were published with this schedule.
_SCHEDULE = ScheduleConfig(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
)
_VAE = VaeConfig(
    latent_channels=4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
    scaling_factor=0.18215,
)
SD_15 = ImageDecoder(
    UNetConfig(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
    _VAE,
    _SCHEDULE,
)
SD_21_BASE = ImageDecoder(
    dataclasses.replace(
        SD_15.unet,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
    _VAE,
    _SCHEDULE,
)
SD_21 = ImageDecoder(
    dataclasses.replace(SD_21_BASE.unet, sample_size=96, upcast_attention=True),
    dataclasses.replace(_VAE, sample_size=768),
    dataclasses.replace(_SCHEDULE, prediction_type="v_prediction"),
)
SDXL_BASE = ImageDecoder(
    UNetConfig(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    dataclasses.replace(_VAE, sample_size=1024, scaling_factor=0.13025),
    _SCHEDULE,
)
DIFFUSION: Mapping[str, ImageDecoder] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD_15,
    "runwayml/stable-diffusion-v1-5": SD_15,  # where it was published first
    "stabilityai/stable-diffusion-2-1-base": SD_21_BASE,
    "stabilityai/stable-diffusion-2-1": SD_21,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL_BASE,
}
