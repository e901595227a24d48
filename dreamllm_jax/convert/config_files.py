"""Our configs as the `config.json` files of transformers, diffusers and the reference.

The files are written in the spelling of transformers 4, which the reference needs and which release 5 reads
too. The config classes of transformers 5 are not used to write: they write `dtype` and `rope_parameters`,
which the reference's release ignores, so that rotary scaling would be lost without a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamllm_jax.config import presets
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)
from dreamllm_jax.config.train import LossConfig

_PLUGINS = "omni.models.dreamllm.modeling_plugins"
_PLUGINS_XL = "omni.models.dreamllm_sdxl.modeling_plugins"
_LOSS_SCALES = {"none": "none", "l1": "l1_norm", "l2": "l2_norm"}


def llama_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Returns a `transformers.LlamaConfig`, as releases 4 write it (5 reads it too)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **to_dict(config),
    }


def clip_vision_json(config: ClipVisionConfig, dtype: str) -> dict[str, Any]:
    """Returns a `transformers.CLIPVisionConfig`."""
    head = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": dtype}
    return head | to_dict(config)


def preprocessor_json(config: ClipVisionConfig) -> dict[str, Any]:
    """Returns a `transformers.CLIPImageProcessor`: the preprocessing of images for the tower."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def clip_text_json(config: ClipTextConfig, dtype: str) -> dict[str, Any]:
    """Returns a `transformers.CLIPTextConfig`."""
    head = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": dtype}
    return head | {"bos_token_id": None, "pad_token_id": None} | to_dict(config)


def clip_json(vision: ClipVisionConfig, text: ClipTextConfig, dtype: str) -> dict[str, Any]:
    """Returns a `transformers.CLIPConfig`."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "torch_dtype": dtype,
        "projection_dim": text.projection_dim,
        "vision_config": clip_vision_json(vision, dtype),
        "text_config": clip_text_json(text, dtype),
    }


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """Returns the config of a `diffusers.UNet2DConditionModel`."""
    return {"_class_name": "UNet2DConditionModel", "act_fn": "silu", **to_dict(config)}


def vae_json(config: VaeConfig) -> dict[str, Any]:
    """Returns the config of a `diffusers.AutoencoderKL`."""
    blocks = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        **to_dict(config),
    }


def scheduler_json(config: ScheduleConfig) -> dict[str, Any]:
    """Returns the config of a `diffusers.DDPMScheduler`, with which the reference samples."""
    return {
        "_class_name": "DDPMScheduler",
        "clip_sample": False,
        "variance_type": "fixed_small",
        **to_dict(config),
    }


def dreamllm_json(
    config: DreamLLMConfig, loss: LossConfig, dtype: str, special_tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the reference's `DreamLLMConfig`, its plugins named by their class paths."""
    assert config.llama is not None
    width = config.llama.hidden_size
    common = {"pretrained_model_name_or_path": None, "embed_hidden_size": width}
    plugins: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    if config.draws:
        queries = {"num_dream_queries": config.num_dream_queries, "_target_": f"{_PLUGINS}.DreamEmbedding"}
        plugins["dream_embedding"], kinds["dream_embedding"] = common | queries, "embedding"
    if config.vision is not None:
        kinds["clip_vision_embedding"] = "embedding"
        plugins["clip_vision_embedding"] = common | {
            "clip_vision_model_name_or_path": _known(presets.VISION, config.vision, "./clip"),
            "select_layer": config.vision_select_layer,
            **_projector(config.vision_projector),
            "_target_": f"{_PLUGINS}.CLIPVisionEmbedding",
        }
    if config.unet is not None:
        assert config.vae is not None  # the config has both or neither
        decoder = presets.ImageDecoder(config.unet, config.vae, config.schedule)
        large = config.unet.pooled_text_dim is not None
        name = "stable_diffusion_xl_head" if large else "stable_diffusion_head"
        kinds[name] = "head"
        plugins[name] = common | {
            "diffusion_name_or_path": _known(presets.DIFFUSION, decoder, "./sd"),
            **_projector(config.condition_projector),
            "resolution": config.image_size,
            "snr_gamma": loss.snr_gamma,
            "drop_prob": loss.condition_dropout or None,
            "noise_offset": loss.noise_offset,
            **({"input_perturbation": loss.input_perturbation} if loss.input_perturbation else {}),
            "_target_": f"{_PLUGINS_XL}.StableDiffusionXLHead"
            if large
            else f"{_PLUGINS}.StableDiffusionHead",
        }
    return llama_json(config.llama, dtype) | {
        "model_type": "dreamllm",
        "plugins_init_kwargs": plugins,
        "plugins_type": kinds,
        "special_tokens2ids_dict": dict(special_tokens),
        "loss_weight_lm": loss.weight_lm,
        "loss_weight_vm": loss.weight_vm,
        "loss_scale_schedule": _LOSS_SCALES[loss.scale],
    }


def _projector(config: ProjectorConfig) -> dict[str, Any]:
    return {"projector_type": config.kind, "projector_depth": config.depth}


def _known(table: Mapping[str, Any], value: Any, otherwise: str) -> str:
    """Returns the hub's name of a published tower, or the folder that the export writes it to."""
    return next((name for name, known in table.items() if known == value), otherwise)
