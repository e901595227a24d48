"""Stable Diffusion 1.x, 2.x and SDXL, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipTextConfig, ScheduleConfig, UNetConfig, VaeConfig
from dreamllm_jax.convert.adapters.clip import CLIP_TEXT_PREFIXES
from dreamllm_jax.convert.foreign import ForeignCheckpoint, split_by_prefix
from dreamllm_jax.convert.weights import DIFFUSERS_STEMS, read_weights


def open_diffusers(folder: Path) -> ForeignCheckpoint:
    """Opens the U-Net, the VAE and, where it is the U-Net's only one, the text encoder."""
    unet = UNetConfig.from_hf(read_json(folder / "unet" / "config.json"))
    vae = VaeConfig.from_hf(read_json(folder / "vae" / "config.json"))
    schedule = ScheduleConfig.from_hf(read_json(folder / "scheduler" / "scheduler_config.json"))
    text = None
    if (folder / "text_encoder" / "config.json").is_file():
        text = ClipTextConfig.from_hf(read_json(folder / "text_encoder" / "config.json"))
        # SDXL concatenates two encoders into one context, which DreamLLM never uses.
        text = text if text.hidden_size == unet.cross_attention_dim else None
    size = unet.sample_size * vae.downscale
    model = DreamLLMConfig(unet=unet, vae=vae, schedule=schedule, text=text, image_size=size)
    source = ForeignCheckpoint("Stable Diffusion (diffusers)", folder, model, {})
    others = ("text_encoder_2", "text_encoder_3", "image_encoder", "safety_checker")
    for name in (*others, *(("text_encoder",) if text is None else ())):
        if (folder / name).is_dir():
            source.report.ignored.append(f"{folder / name} (not part of the model)")
    for part in ("unet", "vae"):
        source.parts[part] = read_weights(folder / part, DIFFUSERS_STEMS)
    if text is not None:
        source.parts |= split_by_prefix(
            read_weights(folder / "text_encoder"), CLIP_TEXT_PREFIXES, source.report
        )
    return source
