"""The published DreamLLM checkpoint: which of its files and prefixes hold which part, and its config.json.

A folder holds the language model in LLaMA's files and one file per plugin. `config.json` names the
plugins' settings under `plugins_init_kwargs`, with Python class paths, which are never imported, and
the folders of the CLIP and Stable Diffusion configs, which are looked up beside the checkpoint.
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
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.convert.weights import DIFFUSERS_STEMS, find_weights, read_file, read_weights


class PrefixRule(NamedTuple):
    """Tensors of `file` (without suffix; "" is the language model's) under `prefix` belong to `part`."""

    file: str
    prefix: str
    part: str


# What each file holds. The first file of a part that exists is its source.
PREFIXES = (
    PrefixRule("clip_vision_embedding", "clip_vision_model.vision_model.", "vision"),
    PrefixRule("clip_vision_embedding", "projector.", "vision_projector"),
    PrefixRule("dream_embedding", "", "dream_queries"),
    PrefixRule("stable_diffusion_head", "unet.", "unet"),
    PrefixRule("stable_diffusion_head", "vae.", "vae"),
    PrefixRule("stable_diffusion_head", "projector.", "condition_projector"),
    PrefixRule("stable_diffusion_xl_head", "unet.", "unet"),
    PrefixRule("stable_diffusion_xl_head", "vae.", "vae"),
    PrefixRule("stable_diffusion_xl_head", "projector.", "condition_projector"),
    PrefixRule("stable_diffusion_xl_head", "global_projector.", "global_projector"),
    # Legacy: the connectors alone.
    PrefixRule("clip_vision_model_projector", "", "vision_projector"),
    PrefixRule("dream_queries", "", "dream_queries"),
    PrefixRule("unet_projector", "", "condition_projector"),
    # Plugins saved inside the language model's file.
    PrefixRule("", "model.clip_vision_embedding.clip_vision_model.vision_model.", "vision"),
    PrefixRule("", "model.clip_vision_embedding.projector.", "vision_projector"),
    PrefixRule("", "model.dream_embedding.", "dream_queries"),
    PrefixRule("", "stable_diffusion_head.unet.", "unet"),
    PrefixRule("", "stable_diffusion_head.vae.", "vae"),
    PrefixRule("", "stable_diffusion_head.projector.", "condition_projector"),
    PrefixRule("", "stable_diffusion_xl_head.unet.", "unet"),
    PrefixRule("", "stable_diffusion_xl_head.vae.", "vae"),
    PrefixRule("", "stable_diffusion_xl_head.projector.", "condition_projector"),
    PrefixRule("", "stable_diffusion_xl_head.global_projector.", "global_projector"),
    PrefixRule("", "", "llama"),
)
PLUGIN_FILES = tuple(dict.fromkeys(m.file for m in PREFIXES if m.file))

# Where the CLIP and Stable Diffusion configs are, below the folder of parts.
CLIP_FOLDERS, DIFFUSION_FOLDERS = ("clip",), ("sd", "sdxl", "diffusion")

# Every option of the plugins that says something about the model, its loss, or where its files are.
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
    """What a checkpoint's config.json says: the model, the loss it was trained with, its part folders.

    `special_tokens` are the config's ids; where the tokenizer disagrees, the tokenizer is right. `unknown`
    are lines about options that are not used.
    """

    model: DreamLLMConfig
    loss: LossConfig
    clip_folder: Path | None
    diffusion_folder: Path | None
    special_tokens: Mapping[str, Any]
    unknown: tuple[str, ...] = ()


def configs_from_dreamllm(folder: str | Path, parts_dir: str | Path | None = None) -> DreamLLMSettings:
    """Reads `config.json` of a DreamLLM checkpoint and the configs of the towers it names.

    `parts_dir` holds `clip/config.json` and `sd/{unet,vae,scheduler}/`, or folders named as config.json
    names them; by default the checkpoint's own folder, its `parts` and the `parts` beside it are searched,
    and the settings of the published towers are known.

    Raises:
      ValueError: a missing config, or an option that is not supported, by name.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    plugins = _object(raw, "plugins_init_kwargs")
    places = [Path(parts_dir)] if parts_dir else [folder, folder / "parts", folder.parent / "parts"]
    model: dict[str, Any] = {"llama": LlamaConfig.from_hf(raw)}
    loss: dict[str, Any] = {}
    clip_folder = diffusion_folder = None
    for name, options in plugins.items():
        if name == "dream_embedding":
            model["num_dream_queries"] = _option(options, name, "num_dream_queries", 64)
        elif name == "clip_vision_embedding":
            clip_folder = _clip(options, name, places, model)
        elif name in ("stable_diffusion_head", "stable_diffusion_xl_head"):
            diffusion_folder = _diffusion(options, name, places, model, loss)
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
        f"config.json: {plugin}.{key} is not an option that is known here; it is not used"
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
    """The object of that name in config.json, empty where there is none."""
    found = raw[key] if key in raw and raw[key] is not None else {}
    if not isinstance(found, Mapping):
        raise ValueError(f"config.json: {key} is {found!r}; expected an object.")
    return found


def _clip(options: Mapping, name: str, places: list[Path], model: dict[str, Any]) -> Path | None:
    if _option(options, name, "use_additional_post_layernorm", False):
        raise ValueError(f"config.json: {name}.use_additional_post_layernorm=True is not supported.")
    source = _option(options, name, "clip_vision_model_name_or_path", "")
    found = _find(places, source, CLIP_FOLDERS, "config.json")
    if found is not None:
        model["vision"] = ClipVisionConfig.from_hf(read_json(found / "config.json"))
    elif source in presets.VISION:
        model["vision"] = presets.VISION[source]
    else:
        raise ValueError(_not_found("CLIP", source, places, "clip/config.json"))
    model["vision_projector"] = _projector(options, name, bias=True)
    model["vision_select_layer"] = _option(options, name, "select_layer", -2)
    return found


def _diffusion(
    options: Mapping, name: str, places: list[Path], model: dict[str, Any], loss: dict[str, Any]
) -> Path | None:
    source = _option(options, name, "diffusion_name_or_path", "")
    found = _find(places, source, DIFFUSION_FOLDERS, "unet/config.json")
    if found is not None:
        unet = UNetConfig.from_hf(read_json(found / "unet" / "config.json"))
        vae = VaeConfig.from_hf(read_json(found / "vae" / "config.json"))
        schedule = ScheduleConfig.from_hf(read_json(found / "scheduler" / "scheduler_config.json"))
    elif source in presets.DIFFUSION:
        decoder = presets.DIFFUSION[source]
        unet, vae, schedule = decoder.unet, decoder.vae, decoder.schedule
    else:
        raise ValueError(_not_found("Stable Diffusion", source, places, "sd/unet/config.json"))
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
    # The reference's conv projector always has a bias, its SAM projector never.
    return ProjectorConfig(kind=kind, depth=depth, bias={"conv": True, "sam": False}.get(kind, bias))


def _option(options: Mapping, where: str, key: str, default: Any) -> Any:
    """A setting, or the reference's default, which is of its type (None: a number, or nothing)."""
    if not isinstance(options, Mapping):
        raise ValueError(f"config.json: {where} is {options!r}; expected an object.")
    value = options[key] if key in options else default
    wanted = (str,) if isinstance(default, str) else (int, float)
    if not isinstance(value, wanted) and not (value is None and default is None):
        kind = "a string" if isinstance(default, str) else "a number"
        raise ValueError(f"config.json: {where}.{key} is {value!r}; expected {kind}.")
    return value


def _find(places: list[Path], source: str, usual: tuple[str, ...], needed: str) -> Path | None:
    names = (source, Path(source).name, *usual) if source else usual
    for place in places:
        for name in names:
            if (place / name / needed).is_file():
                return place / name
    return None


def _not_found(what: str, source: str, places: list[Path], needed: str) -> str:
    return (
        f"The {what} config that config.json names ({source!r}) was not found; put it as {needed} "
        f"into one of {', '.join(map(str, places))}, or give the folder of parts."
    )


def read_dreamllm(
    folder: str | Path, settings: DreamLLMSettings
) -> tuple[dict[str, dict[str, Tensor]], Report]:
    """All tensors of a checkpoint by part, unread, and what was set aside.

    A part that the checkpoint lacks (legacy folders hold only the connectors) is read from the
    part folders that `settings` found.
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
            mount = next((m for m in PREFIXES if m.file == file and name.startswith(m.prefix)), None)
            if mount is None:
                report.unexpected.append(f"{tensor.origin} {tensor.shape}")
            elif source.setdefault(mount.part, file) != file:
                report.ignored.append(f"{tensor.origin} {tensor.shape} ({source[mount.part]} has this part)")
            else:
                inner = name.removeprefix(mount.prefix) or mount.part
                parts.setdefault(mount.part, {})[inner] = tensor
    _complete(parts, settings)
    return parts, report


def _complete(parts: dict[str, dict[str, Tensor]], settings: DreamLLMSettings) -> None:
    """Adds the towers that the checkpoint does not hold from the folders of parts."""
    clip, diffusion = settings.clip_folder, settings.diffusion_folder
    if "vision" not in parts and clip is not None and find_weights(clip):
        # A whole CLIP model or its vision tower alone, with or without (transformers 5) the prefix.
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
