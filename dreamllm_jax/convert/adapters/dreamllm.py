"""DreamLLM's own checkpoints: which part is in which file under which prefix, and their config.json.

A folder has the language model in LLaMA's files and one file per plugin. `config.json` has the plugins'
settings under `plugins_init_kwargs`, with Python class paths, which are never imported, and the names of the
folders of the CLIP and Stable Diffusion configs, which are looked up beside the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.checkpoint.tensors import Tensor
from dreamllm_jax.config import presets
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import (
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.foreign import ForeignCheckpoint, stated_ids
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.convert.weights import DIFFUSERS_STEMS, find_weights, read_file, read_weights

# The conversation template that DreamLLM and LLaVA-1.5 were trained with.
VICUNA = "vicuna_v1.1"


class FileRule(NamedTuple):
    """Tensors of `file` (without suffix; "" is the language model's) under `prefix` belong to `part`."""

    file: str
    prefix: str
    part: str


# The parts in each file. The first existing file of a part is its source.
FILES = (
    FileRule("clip_vision_embedding", "clip_vision_model.vision_model.", "vision"),
    FileRule("clip_vision_embedding", "projector.", "vision_projector"),
    FileRule("dream_embedding", "", "dream_queries"),
    FileRule("stable_diffusion_head", "unet.", "unet"),
    FileRule("stable_diffusion_head", "vae.", "vae"),
    FileRule("stable_diffusion_head", "projector.", "condition_projector"),
    FileRule("stable_diffusion_xl_head", "unet.", "unet"),
    FileRule("stable_diffusion_xl_head", "vae.", "vae"),
    FileRule("stable_diffusion_xl_head", "projector.", "condition_projector"),
    FileRule("stable_diffusion_xl_head", "global_projector.", "global_projector"),
    # Legacy: the connectors only.
    FileRule("clip_vision_model_projector", "", "vision_projector"),
    FileRule("dream_queries", "", "dream_queries"),
    FileRule("unet_projector", "", "condition_projector"),
    # Plugins saved inside the language model's file.
    FileRule("", "model.clip_vision_embedding.clip_vision_model.vision_model.", "vision"),
    FileRule("", "model.clip_vision_embedding.projector.", "vision_projector"),
    FileRule("", "model.dream_embedding.", "dream_queries"),
    FileRule("", "stable_diffusion_head.unet.", "unet"),
    FileRule("", "stable_diffusion_head.vae.", "vae"),
    FileRule("", "stable_diffusion_head.projector.", "condition_projector"),
    FileRule("", "stable_diffusion_xl_head.unet.", "unet"),
    FileRule("", "stable_diffusion_xl_head.vae.", "vae"),
    FileRule("", "stable_diffusion_xl_head.projector.", "condition_projector"),
    FileRule("", "stable_diffusion_xl_head.global_projector.", "global_projector"),
    FileRule("", "", "llama"),
)
PLUGIN_FILES = tuple(dict.fromkeys(rule.file for rule in FILES if rule.file))

# Usual names of the folders with the CLIP and Stable Diffusion configs.
CLIP_FOLDERS, DIFFUSION_FOLDERS = ("clip",), ("sd", "sdxl", "diffusion")

# Every option of the plugins that concerns the model, its loss, or the location of its files.
_OPTIONS = (
    "pretrained_model_name_or_path",
    "embed_hidden_size",
    "num_dream_queries",
    "clip_vision_model_name_or_path",
    "select_layer",
    "use_additional_post_layernorm",
    "projector_type",
    "projector_depth",
    "diffusion_name_or_path",
    "resolution",
    "snr_gamma",
    "drop_prob",
    "noise_offset",
    "input_perturbation",
)
_LOSS_SCALES = {"none": "none", "l1_norm": "l1", "l2_norm": "l2"}


@dataclasses.dataclass(frozen=True)
class DreamLLMSettings:
    """The contents of a checkpoint's config.json: the model, the loss it was trained with, the folders of its
    towers.

    `special_tokens` are the config's ids; where the tokenizer differs, the tokenizer is right. `unknown` has
    a line for every option that is not used.
    """

    model: DreamLLMConfig
    loss: LossConfig
    clip_folder: Path | None
    diffusion_folder: Path | None
    special_tokens: Mapping[str, Any]
    unknown: tuple[str, ...] = ()


def configs_from_dreamllm(folder: str | Path, parts_dir: str | Path | None = None) -> DreamLLMSettings:
    """Reads `config.json` of a DreamLLM checkpoint and the configs of the towers it names.

    `parts_dir` has `clip/config.json` and `sd/{unet,vae,scheduler}/`, or folders with the names in
    config.json. By default the checkpoint's folder, its `parts`, and the `parts` beside it are searched;
    configs of the published towers are known.

    Raises:
      ValueError: a config is missing, or an option is not supported; it is named.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    plugins = _object(raw, "plugins_init_kwargs")
    folders = [Path(parts_dir)] if parts_dir else [folder, folder / "parts", folder.parent / "parts"]
    model: dict[str, Any] = {"llama": LlamaConfig.from_hf(raw)}
    loss: dict[str, Any] = {}
    clip_folder = diffusion_folder = None
    for name, options in plugins.items():
        if name == "dream_embedding":
            model["num_dream_queries"] = _option(options, name, "num_dream_queries", 64)
        elif name == "clip_vision_embedding":
            clip_folder = _clip(options, name, folders, model)
        elif name in ("stable_diffusion_head", "stable_diffusion_xl_head"):
            diffusion_folder = _diffusion(options, name, folders, model, loss)
        else:
            raise ValueError(f"{folder}/config.json: plugin {name!r} is not supported.")
    scale = _option(raw, "config.json", "loss_scale_schedule", "none")
    if scale not in _LOSS_SCALES:
        raise ValueError(f"{folder}/config.json: loss_scale_schedule={scale!r} is not supported.")
    loss |= {
        "weight_lm": float(_option(raw, "config.json", "loss_weight_lm", 1.0)),
        "weight_vm": float(_option(raw, "config.json", "loss_weight_vm", 10.0)),
        "scale": _LOSS_SCALES[scale],
    }
    unknown = [
        f"config.json: {plugin}.{key} is an unknown option; it is not used"
        for plugin, options in plugins.items()
        for key in options
        if key not in _OPTIONS and not key.startswith("_")
    ]
    return DreamLLMSettings(
        DreamLLMConfig(**model),
        LossConfig(**loss),
        clip_folder,
        diffusion_folder,
        _object(raw, "special_tokens2ids_dict"),
        tuple(unknown),
    )


def _object(raw: Mapping, key: str) -> Mapping:
    """Returns the object of that name in config.json; empty if it is absent."""
    found = raw[key] if key in raw and raw[key] is not None else {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json: {key} is {found!r}; expected an object.")
    return found


def _clip(options: Mapping, name: str, folders: list[Path], model: dict[str, Any]) -> Path | None:
    if _option(options, name, "use_additional_post_layernorm", False):
        raise ValueError(f"config.json: {name}.use_additional_post_layernorm=True is not supported.")
    source = _option(options, name, "clip_vision_model_name_or_path", "")
    found = _find(folders, source, CLIP_FOLDERS, "config.json")
    if found is not None:
        model["vision"] = ClipVisionConfig.from_hf(read_json(found / "config.json"))
    elif source in presets.VISION:
        model["vision"] = presets.VISION[source]
    else:
        raise ValueError(_not_found("CLIP", source, folders, "clip/config.json"))
    model["vision_projector"] = _projector(options, name, bias=True)
    model["vision_select_layer"] = _option(options, name, "select_layer", -2)
    return found


def _diffusion(
    options: Mapping, name: str, folders: list[Path], model: dict[str, Any], loss: dict[str, Any]
) -> Path | None:
    source = _option(options, name, "diffusion_name_or_path", "")
    found = _find(folders, source, DIFFUSION_FOLDERS, "unet/config.json")
    if found is not None:
        unet = UNetConfig.from_hf(read_json(found / "unet" / "config.json"))
        vae = VaeConfig.from_hf(read_json(found / "vae" / "config.json"))
        schedule = ScheduleConfig.from_hf(read_json(found / "scheduler" / "scheduler_config.json"))
    elif source in presets.DIFFUSION:
        decoder = presets.DIFFUSION[source]
        unet, vae, schedule = decoder.unet, decoder.vae, decoder.schedule
    else:
        raise ValueError(_not_found("Stable Diffusion", source, folders, "sd/unet/config.json"))
    model |= {"unet": unet, "vae": vae, "schedule": schedule}
    model["condition_projector"] = _projector(options, name, bias=False)
    model["image_size"] = _option(options, name, "resolution", vae.sample_size)
    loss |= {
        "snr_gamma": _option(options, name, "snr_gamma", None),
        "noise_offset": float(_option(options, name, "noise_offset", None) or 0.0),
        "input_perturbation": float(_option(options, name, "input_perturbation", None) or 0.0),
        "condition_dropout": float(_option(options, name, "drop_prob", None) or 0.0),
    }
    return found


def _projector(options: Mapping, name: str, bias: bool) -> ProjectorConfig:
    kind = _option(options, name, "projector_type", "linear")
    if kind not in ("linear", "mlp", "conv", "sam"):
        raise ValueError(f"config.json: {name}.projector_type={kind!r} is not supported.")
    depth = _option(options, name, "projector_depth", 1)
    if kind in ("conv", "sam"):  # the reference's conv projector always has a bias, its SAM projector never
        bias = kind == "conv"
    return ProjectorConfig(kind=kind, depth=depth, bias=bias)


def _option(options: Mapping, where: str, key: str, default: Any) -> Any:
    """Returns a setting, or the reference's default, which determines its type (None: a number, or null)."""
    if not isinstance(options, Mapping):
        raise ValueError(f"config.json: {where} is {options!r}; expected an object.")
    value = options[key] if key in options else default
    wanted = (str,) if isinstance(default, str) else (int, float)
    if not isinstance(value, wanted) and not (value is None and default is None):
        kind = "a string" if isinstance(default, str) else "a number"
        raise ValueError(f"config.json: {where}.{key} is {value!r}; expected {kind}.")
    return value


def _find(folders: list[Path], source: str, usual: tuple[str, ...], needed: str) -> Path | None:
    names = (source, Path(source).name, *usual) if source else usual
    for parent in folders:
        for name in names:
            if (parent / name / needed).is_file():
                return parent / name
    return None


def _not_found(what: str, source: str, folders: list[Path], needed: str) -> str:
    return (
        f"The {what} config that config.json names ({source!r}) was not found; put it as {needed} "
        f"into one of {', '.join(map(str, folders))}, or give the folder of parts."
    )


def read_dreamllm(
    folder: str | Path, settings: DreamLLMSettings
) -> tuple[dict[str, dict[str, Tensor]], Report]:
    """Returns all tensors of a checkpoint by part, not read yet, and a report of the others.

    A part that the checkpoint lacks (legacy folders have only the connectors) comes from the folders in
    `settings`.
    """
    folder = Path(folder)
    files = {"": read_weights(folder)}
    for stem in PLUGIN_FILES:
        for suffix in (".safetensors", ".bin", ".pt"):
            if (folder / f"{stem}{suffix}").is_file():
                files[stem] = read_file(folder / f"{stem}{suffix}")
                break
    report, parts = Report(), {}
    source: dict[str, str] = {}
    for file in [*PLUGIN_FILES, ""]:
        if file not in files:
            continue
        for name, tensor in files[file].items():
            rule = next((r for r in FILES if r.file == file and name.startswith(r.prefix)), None)
            if rule is None:
                report.unexpected.append(f"{tensor.origin} {tensor.shape}")
            elif source.setdefault(rule.part, file) != file:
                report.ignored.append(f"{tensor.origin} {tensor.shape} ({source[rule.part]} has this part)")
            else:
                inner = name.removeprefix(rule.prefix) or rule.part
                parts.setdefault(rule.part, {})[inner] = tensor
    _complete(parts, settings)
    return parts, report


def _complete(parts: dict[str, dict[str, Tensor]], settings: DreamLLMSettings) -> None:
    """Adds the towers that the checkpoint lacks, from their own folders."""
    clip, diffusion = settings.clip_folder, settings.diffusion_folder
    if "vision" not in parts and clip is not None and find_weights(clip):
        # A complete CLIP model, or its vision tower with or (transformers 5) without the prefix.
        tensors, others = (
            read_weights(clip),
            ("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        )
        parts["vision"] = {
            n.removeprefix("vision_model."): t for n, t in tensors.items() if not n.startswith(others)
        }
    for part in ("unet", "vae"):
        if part not in parts and diffusion is not None and find_weights(diffusion / part, DIFFUSERS_STEMS):
            parts[part] = read_weights(diffusion / part, DIFFUSERS_STEMS)


def open_dreamllm(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    """Opens a DreamLLM checkpoint as its authors publish it."""
    settings = configs_from_dreamllm(folder, parts_dir)
    parts, report = read_dreamllm(folder, settings)
    report.differing += settings.unknown
    stated = {name: i for name, i in settings.special_tokens.items() if isinstance(i, int)}
    if "additional_special_tokens" in settings.special_tokens:
        stated |= settings.special_tokens["additional_special_tokens"]
    source = ForeignCheckpoint("DreamLLM", folder, settings.model, parts, report, settings.loss, VICUNA)
    return dataclasses.replace(source, stated=stated | stated_ids(raw, "pad_token_id"))
