"""LLaVA-1.5: the authors' release, and the Hugging Face port."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.config import presets
from dreamllm_jax.config.hugging_face import transformers_options
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipVisionConfig, LlamaConfig, ProjectorConfig
from dreamllm_jax.convert.adapters.clip import CLIP_VISION_PREFIXES, find_clip
from dreamllm_jax.convert.adapters.dreamllm import VICUNA
from dreamllm_jax.convert.foreign import (
    ForeignCheckpoint,
    PrefixRule,
    check_options,
    open_folder,
    split_by_prefix,
    stated_ids,
)
from dreamllm_jax.convert.mapping import Report
from dreamllm_jax.convert.weights import find_weights, read_weights

# The authors' release, and the Hugging Face port before and after transformers 4.52.
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
# Options of the release, which no library reads, and of the port, with the values that are implemented.
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


def open_llava(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    """Opens the authors' release; the vision tower may be in a folder of its own."""
    name = raw["mm_vision_tower"] if raw.get("mm_vision_tower") else ""
    kind = raw.get("mm_projector_type") or "linear"
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", kind):
        raise ValueError(f"{folder}/config.json: mm_projector_type={kind!r} is not supported.")
    depth = 1 if kind == "linear" else int(kind[3])
    check_options(folder, raw, _LLAVA_ONLY)
    tower = find_clip(folder, name, parts_dir)
    if tower is None and name not in presets.VISION:
        raise ValueError(
            f"{folder}: the vision tower {name!r} was not found; put its folder beside it, or use --parts."
        )
    model = DreamLLMConfig(
        llama=LlamaConfig.from_hf(raw),
        vision=presets.VISION[name]
        if tower is None
        else ClipVisionConfig.from_hf(read_json(tower / "config.json")),
        vision_projector=ProjectorConfig("linear" if depth == 1 else "mlp", depth),
        vision_select_layer=int(raw.get("mm_vision_select_layer") or -2),
    )
    source = open_folder("LLaVA", folder, model, LLAVA_PREFIXES)
    source = dataclasses.replace(source, template=VICUNA, stated=stated_ids(raw, "pad_token_id"))
    if raw.get("image_aspect_ratio") == "pad":
        source.report.differing.append(
            "config.json says that images are padded to squares; here they are cropped to squares, as in "
            "the Hugging Face port"
        )
    if "vision" not in source.parts and tower is not None and find_weights(tower):
        source.parts["vision"] = split_by_prefix(read_weights(tower), CLIP_VISION_PREFIXES, Report())[
            "vision"
        ]
    return source


def open_llava_port(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    """Opens the Hugging Face port."""
    keys = ("text_config", "vision_config", "vision_feature_layer", *_LLAVA_PORT_ONLY)
    options = transformers_options("LlavaConfig", raw, keys, "LLaVA config")
    check_options(folder, options, _LLAVA_PORT_ONLY)
    for name, kind in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        key = f"{name}.model_type"
        check_options(folder, {key: options[name]["model_type"]}, {key: (kind,)})
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
    source = open_folder("LLaVA (Hugging Face)", folder, model, LLAVA_PORT_PREFIXES)
    stated = stated_ids(raw["text_config"], "pad_token_id") | stated_ids(raw, "pad_token_id")
    for key in ("image_token_index", "image_token_id"):  # its names in transformers 4 and 5
        if key in raw and isinstance(raw[key], int):
            stated["<image>"] = raw[key]
    return dataclasses.replace(source, template=VICUNA, stated=stated)
