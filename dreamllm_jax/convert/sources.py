"""Recognizes what a user brings: weights in PyTorch's forms become a config and tensors by part."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.checkpoint.parameter_files import INDEX
from dreamllm_jax.config import presets
from dreamllm_jax.config.hugging_face import transformers_options
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
from dreamllm_jax.convert import single_file
from dreamllm_jax.convert.dreamllm_files import configs_from_dreamllm, read_dreamllm
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.convert.source import ForeignCheckpoint, PrefixRule, split_by_prefix
from dreamllm_jax.convert.weights import DIFFUSERS_STEMS, find_weights, read_file, read_weights
from dreamllm_jax.data.chat import OWN, template_of
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokenizer_files import has_tokenizer, read_chat_template

# The conversation template that DreamLLM and LLaVA-1.5 were trained with.
VICUNA = "vicuna_v1.1"

LLAMA_PREFIXES = (PrefixRule("", "llama"),)
CLIP_PREFIXES = (
    PrefixRule("vision_model.", "vision"),
    PrefixRule("text_model.", "text"),
    PrefixRule("visual_projection.", "contrastive", "visual_projection."),
    PrefixRule("text_projection.", "contrastive", "text_projection."),
    PrefixRule("logit_scale", "contrastive", "logit_scale"),
)
# transformers 5 writes a lone tower without its prefix.
CLIP_VISION_PREFIXES = (*CLIP_PREFIXES, PrefixRule("", "vision"))
CLIP_TEXT_PREFIXES = (*CLIP_PREFIXES, PrefixRule("", "text"))
# LLaVA-1.5 as its authors publish it, and the Hugging Face port before and after transformers 4.52.
LLAVA_PREFIXES = (
    PrefixRule("model.mm_projector.", "vision_projector", "projector."),
    PrefixRule("model.vision_tower.vision_tower.vision_model.", "vision"),
    PrefixRule("", "llama"),
)
LLAVA_PORT_PREFIXES = (
    PrefixRule("multi_modal_projector.", "vision_projector"),
    PrefixRule("vision_tower.vision_model.", "vision"),
    PrefixRule("vision_tower.", "vision"),
    PrefixRule("language_model.", "llama"),
    PrefixRule("model.multi_modal_projector.", "vision_projector"),
    PrefixRule("model.vision_tower.vision_model.", "vision"),
    PrefixRule("model.vision_tower.", "vision"),
    PrefixRule("model.language_model.", "llama", "model."),
    PrefixRule("lm_head.", "llama", "lm_head."),
)


def _open_folder(
    kind: str, folder: Path, model: DreamLLMConfig, prefixes: tuple[PrefixRule, ...]
) -> ForeignCheckpoint:
    report = Report()
    return ForeignCheckpoint(
        kind, folder, model, split_by_prefix(read_weights(folder), prefixes, report), report
    )


def _open_dreamllm(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    settings = configs_from_dreamllm(folder, parts_dir)
    parts, report = read_dreamllm(folder, settings)
    report.differing += settings.unknown
    stated = {name: i for name, i in settings.special_tokens.items() if isinstance(i, int)}
    if "additional_special_tokens" in settings.special_tokens:
        stated |= settings.special_tokens["additional_special_tokens"]
    source = ForeignCheckpoint("DreamLLM", folder, settings.model, parts, report, settings.loss, VICUNA)
    return dataclasses.replace(source, stated=stated | _stated(raw, "pad_token_id"))


def _open_llama(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    source = _open_folder("LLaMA", folder, DreamLLMConfig(llama=LlamaConfig.from_hf(raw)), LLAMA_PREFIXES)
    template = None
    if has_tokenizer(folder) and read_chat_template(folder) is not None:
        try:
            template_of(OWN, Tokenizer.load(folder, extend=True))
            template = OWN
        except ValueError as error:
            source.report.differing.append(f"prompts are not put into the tokenizer's chat template: {error}")
    return dataclasses.replace(source, stated=_stated(raw), template=template)


def _stated(raw: Mapping[str, Any], *more: str) -> dict[str, int]:
    """The ids that a LLaMA's config.json repeats, by the tokens' names; `more` are further keys."""
    names = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "[PAD]"}
    keys = ("bos_token_id", "eos_token_id", *more)
    return {names[key]: raw[key] for key in keys if key in raw and isinstance(raw[key], int)}


_CLIP_PREFIXES = {
    "clip": CLIP_PREFIXES,
    "clip_vision_model": CLIP_VISION_PREFIXES,
    "clip_text_model": CLIP_TEXT_PREFIXES,
}


def _open_clip(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    kind = raw["model_type"]
    model = DreamLLMConfig(
        vision=None if kind == "clip_text_model" else ClipVisionConfig.from_hf(raw),
        text=None if kind == "clip_vision_model" else ClipTextConfig.from_hf(raw),
        contrastive=kind == "clip",
    )
    return _open_folder("CLIP", folder, model, _CLIP_PREFIXES[kind])


# Options of LLaVA-1.5 (which no library reads) and of its port, with the values that are implemented.
_LLAVA_ONLY: Mapping[str, tuple] = {
    "mm_vision_select_feature": ("patch", None),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", None),
}
_LLAVA_PORT_ONLY: Mapping[str, tuple] = {
    "vision_feature_select_strategy": ("default",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}


def _open_llava(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    name = raw["mm_vision_tower"] if raw.get("mm_vision_tower") else ""
    kind = raw.get("mm_projector_type") or "linear"
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", kind):
        raise ValueError(f"{folder}/config.json: mm_projector_type={kind!r} is not supported.")
    depth = 1 if kind == "linear" else int(kind[3])
    _check_options(folder, raw, _LLAVA_ONLY)
    tower = _clip_folder(folder, name, parts_dir)
    if tower is None and name not in presets.VISION:
        raise ValueError(
            f"{folder}: the vision tower {name!r} was not found; put its folder beside, or use --parts."
        )
    model = DreamLLMConfig(
        llama=LlamaConfig.from_hf(raw),
        vision=presets.VISION[name]
        if tower is None
        else ClipVisionConfig.from_hf(read_json(tower / "config.json")),
        vision_projector=ProjectorConfig("linear" if depth == 1 else "mlp", depth),
        vision_select_layer=int(raw.get("mm_vision_select_layer") or -2),
    )
    source = _open_folder("LLaVA", folder, model, LLAVA_PREFIXES)
    source = dataclasses.replace(source, template=VICUNA, stated=_stated(raw, "pad_token_id"))
    if raw.get("image_aspect_ratio") == "pad":
        source.report.differing.append(
            "config.json says that pictures are padded to squares; here they are cut to squares, as the "
            "Hugging Face port does"
        )
    if "vision" not in source.parts and tower is not None and find_weights(tower):
        source.parts["vision"] = split_by_prefix(read_weights(tower), CLIP_VISION_PREFIXES, Report())[
            "vision"
        ]
    return source


def _open_llava_port(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    keys = ("text_config", "vision_config", "vision_feature_layer", *_LLAVA_PORT_ONLY)
    options = transformers_options("LlavaConfig", raw, keys, "LLaVA config")
    _check_options(folder, options, _LLAVA_PORT_ONLY)
    for name, kind in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        key = f"{name}.model_type"
        _check_options(folder, {key: options[name]["model_type"]}, {key: (kind,)})
    if not isinstance(options["vision_feature_layer"], int):
        raise ValueError(
            f"{folder}/config.json: vision_feature_layer={options['vision_feature_layer']} is not supported; "
            "supported: one layer."
        )
    model = DreamLLMConfig(
        llama=LlamaConfig.from_hf(options["text_config"]),
        vision=ClipVisionConfig.from_hf(options["vision_config"]),
        vision_projector=ProjectorConfig("mlp", 2),
        vision_select_layer=options["vision_feature_layer"],
    )
    source = _open_folder("LLaVA (Hugging Face)", folder, model, LLAVA_PORT_PREFIXES)
    stated = _stated(raw["text_config"], "pad_token_id") | _stated(raw, "pad_token_id")
    for key in ("image_token_index", "image_token_id"):  # its names in transformers 4 and 5
        if key in raw and isinstance(raw[key], int):
            stated["<image>"] = raw[key]
    return dataclasses.replace(source, template=VICUNA, stated=stated)


def _check_options(folder: Path, raw: Mapping[str, Any], only: Mapping[str, tuple]) -> None:
    """Raises ValueError for an option with a value that is not implemented, by name."""
    for key, supported in only.items():
        if key in raw and raw[key] not in supported:
            raise ValueError(
                f"{folder}/config.json: {key}={raw[key]!r} is not supported; supported: "
                f"{', '.join(map(repr, supported))}."
            )


def _clip_folder(folder: Path, name: str, parts_dir: Path | None) -> Path | None:
    places = [parts_dir] if parts_dir else [folder, folder.parent]
    candidates = [
        place / n for place in places for n in (name, Path(name).name, "clip", "") if n or parts_dir
    ]
    for candidate in candidates:
        config = candidate / "config.json"
        if config.is_file() and str(read_json(config).get("model_type", "")).startswith("clip"):
            return candidate
    return None


def _open_diffusers(folder: Path) -> ForeignCheckpoint:
    unet = UNetConfig.from_hf(read_json(folder / "unet" / "config.json"))
    vae = VaeConfig.from_hf(read_json(folder / "vae" / "config.json"))
    schedule = ScheduleConfig.from_hf(read_json(folder / "scheduler" / "scheduler_config.json"))
    text = None
    if (folder / "text_encoder" / "config.json").is_file():
        text = ClipTextConfig.from_hf(read_json(folder / "text_encoder" / "config.json"))
        # SDXL joins two encoders to one context, which DreamLLM never uses.
        text = text if text.hidden_size == unet.cross_attention_dim else None
    size = unet.sample_size * vae.downscale
    model = DreamLLMConfig(unet=unet, vae=vae, schedule=schedule, text=text, image_size=size)
    source = ForeignCheckpoint("Stable Diffusion (diffusers)", folder, model, {})
    others = ("text_encoder_2", "text_encoder_3", "image_encoder", "safety_checker")
    for name in (*others, *(("text_encoder",) if text is None else ())):
        if (folder / name).is_dir():
            source.report.ignored.append(f"{folder / name} (the model has no place for it)")
    for part in ("unet", "vae"):
        source.parts[part] = read_weights(folder / part, DIFFUSERS_STEMS)
    if text is not None:
        source.parts |= split_by_prefix(
            read_weights(folder / "text_encoder"), CLIP_TEXT_PREFIXES, source.report
        )
    return source


def _open_single_file(file: Path, prediction_type: str | None) -> ForeignCheckpoint:
    tensors = read_file(file)
    try:
        parts, left = single_file.split(tensors)
        unet, vae, schedule = single_file.configs(parts, prediction_type)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{file} lacks {error} of a Stable Diffusion; it is incomplete.") from error
    size = unet.sample_size * vae.downscale
    model = DreamLLMConfig(unet=unet, vae=vae, schedule=schedule, image_size=size)
    report = Report(ignored=[f"{name} {tensors[name].shape} (beside U-Net and VAE)" for name in left])
    return ForeignCheckpoint("Stable Diffusion (one file)", file, model, parts, report)


_OPENERS: dict[str, Callable[[Path, dict[str, Any], Path | None], ForeignCheckpoint]] = {
    "dreamllm": _open_dreamllm,
    "llama": _open_llama,
    "clip": _open_clip,
    "clip_vision_model": _open_clip,
    "clip_text_model": _open_clip,
    "llava": _open_llava_port,
    "llava_llama": _open_llava,
}


def open_checkpoint(
    path: str | Path, parts_dir: str | Path | None = None, prediction_type: str | None = None
) -> ForeignCheckpoint:
    """Recognizes a checkpoint in PyTorch's form, and opens it without reading its tensors.

    A folder is a DreamLLM, LLaMA/Vicuna, CLIP, LLaVA-1.5 (original or port) or diffusers Stable
    Diffusion one; a `.safetensors` file is a Stable Diffusion. `parts_dir` holds the configs of towers that a
    checkpoint only names. `prediction_type` says what a Stable Diffusion 2 in one file predicts.

    Raises:
      ValueError: an unknown or incomplete folder, or an unsupported option, by name.
    """
    path, parts = Path(path), None if parts_dir is None else Path(parts_dir)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder of weights.")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            return _open_single_file(path, prediction_type)
        raise ValueError(f"{path} is a file; give the folder that holds it, with its config.json.")
    if (path / INDEX).is_file():
        raise ValueError(
            f"{path} is already converted; use to-torch on it (or, if it was to be loaded: its config.json "
            "is of another model, restore the folder)."
        )
    if (path / "unet" / "config.json").is_file():
        return _named(path, _open_diffusers, path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither config.json nor unet/config.json; expected a folder of weights."
        )
    raw = read_json(path / "config.json")
    return _named(path, _OPENERS[_kind(path, raw)], path, raw, parts)


def _named(path: Path, opener: Callable[..., ForeignCheckpoint], *arguments: Any) -> ForeignCheckpoint:
    """What an opener gives; a config that it cannot use is a ValueError that names the folder."""
    try:
        return opener(*arguments)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: a config.json lacks {error}; the folder is incomplete.") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: a config.json has a value of an unexpected kind ({error}).") from error


def _kind(path: Path, raw: dict) -> str:
    kind = str(raw["model_type"]) if "model_type" in raw else ""
    if raw.get("plugins_init_kwargs"):
        return "dreamllm"
    if raw.get("mm_vision_tower"):  # LLaVA's own releases call themselves llava, llava_llama or llama
        return "llava_llama"
    if kind not in _OPENERS:
        raise ValueError(
            f"{path}/config.json says model_type={kind!r}; supported: {', '.join(sorted(_OPENERS))}, and "
            "diffusers folders of Stable Diffusion."
        )
    return kind
