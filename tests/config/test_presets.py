"""The published towers beside their files on the hub, and beside what transformers and diffusers know."""

import dataclasses

import pytest

from dreamllm_jax.config import presets
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)

# What the files on the hub say about the networks, under the names that the libraries use.
LLAMA_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
}
LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "pretraining_tp": 1, "rope_scaling": None}
LANGUAGE = {
    "lmsys/vicuna-7b-v1.1": LLAMA_7B,
    "lmsys/vicuna-7b-v1.5": LLAMA_7B | LLAMA_2,
    "lmsys/vicuna-13b-v1.1": LLAMA_13B,
    "lmsys/vicuna-13b-v1.5": LLAMA_13B | LLAMA_2,
}
CLIP_VISION = {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 224,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_TEXT = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
    "projection_dim": 768,
    "eos_token_id": 49407,
}
VISION = {
    "openai/clip-vit-large-patch14": CLIP_VISION,
    "openai/clip-vit-large-patch14-336": CLIP_VISION | {"image_size": 336},
}
UNET_15 = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_21_BASE = UNET_15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
UNET_XL = UNET_15 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
SD_15 = (UNET_15, VAE, SCHEDULER)
DIFFUSION = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD_15,
    "runwayml/stable-diffusion-v1-5": SD_15,
    "stabilityai/stable-diffusion-2-1-base": (UNET_21_BASE, VAE, SCHEDULER),
    "stabilityai/stable-diffusion-2-1": (
        UNET_21_BASE | {"sample_size": 96, "upcast_attention": True},
        VAE | {"sample_size": 768},
        SCHEDULER | {"prediction_type": "v_prediction"},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        UNET_XL,
        VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        SCHEDULER | {"timestep_spacing": "leading", "use_karras_sigmas": False},
    ),
}
# Parameters of the U-Nets and of their VAE.
UNET_SIZES = {
    presets.SD_15: 859_520_964,
    presets.SD_21_BASE: 865_910_724,
    presets.SD_21: 865_910_724,
    presets.SDXL_BASE: 2_567_463_684,
}
VAE_SIZE = 83_653_863


def test_the_files_on_the_hub_say_the_same():
    for name, file in LANGUAGE.items():
        assert LlamaConfig.from_hf(file) == presets.LANGUAGE[name], name
    for name, file in VISION.items():
        assert ClipVisionConfig.from_hf(file) == presets.VISION[name], name
    assert ClipTextConfig.from_hf(CLIP_TEXT) == presets.CLIP_L14_TEXT
    for name, (unet, vae, scheduler) in DIFFUSION.items():
        known = presets.DIFFUSION[name]
        assert UNetConfig.from_hf(unet) == known.unet, name
        assert VaeConfig.from_hf(vae) == known.vae, name
        assert ScheduleConfig.from_hf(scheduler) == known.schedule, name


def test_every_preset_is_compared():
    for ours, theirs in (
        (presets.LANGUAGE, LANGUAGE),
        (presets.VISION, VISION),
        (presets.DIFFUSION, DIFFUSION),
    ):
        assert ours.keys() == theirs.keys()
    tables = (presets.LANGUAGE, presets.VISION, presets.DIFFUSION)
    listed = [preset for table in tables for preset in table.values()]
    kinds = (LlamaConfig, ClipVisionConfig, presets.ImageDecoder)
    named = [value for name, value in vars(presets).items() if name.isupper() and isinstance(value, kinds)]
    assert all(preset in listed for preset in named) and len(named) == len(set(listed))


def test_transformers_knows_llama_and_clip():
    """LLaMA-7B is its default, and CLIP L/14 at 336 pixels the vision tower of its LLaVA."""
    transformers = pytest.importorskip("transformers")
    assert LlamaConfig.from_hf(transformers.LlamaConfig().to_dict()) == presets.VICUNA_7B
    vision = transformers.LlavaConfig().vision_config.to_dict()
    assert ClipVisionConfig.from_hf(vision) == presets.CLIP_L14_336


@pytest.mark.parity
@pytest.mark.parametrize("name", presets.DIFFUSION)
def test_diffusers_builds_the_same_networks(name):
    """Its models and schedulers, made from the published files, have our settings and as many parameters."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    unet, vae, scheduler = DIFFUSION[name]
    preset = presets.DIFFUSION[name]
    with torch.device("meta"):
        theirs = (diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae))
    sizes = [sum(p.numel() for p in model.parameters()) for model in theirs]
    assert sizes == [UNET_SIZES[preset], VAE_SIZE]
    for ours, model in zip((preset.unet, preset.vae), theirs, strict=True):
        filled = {key: model.config[key] for key in to_dict(ours)}
        assert dataclasses.replace(ours, **_tuples(filled)) == ours
    filled = diffusers.DDIMScheduler.from_config(scheduler).config
    assert dataclasses.replace(preset.schedule, **{k: filled[k] for k in to_dict(preset.schedule)}) == (
        preset.schedule
    )


def _tuples(options):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
