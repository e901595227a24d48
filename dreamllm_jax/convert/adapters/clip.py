"""CLIP: both towers, or one of them, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipTextConfig, ClipVisionConfig
from dreamllm_jax.convert.foreign import ForeignCheckpoint, PrefixRule, open_folder

CLIP_PREFIXES = (
    PrefixRule("vision_model.", "vision"),
    PrefixRule("text_model.", "text"),
    PrefixRule("visual_projection.", "contrastive", "visual_projection."),
    PrefixRule("text_projection.", "contrastive", "text_projection."),
    PrefixRule("logit_scale", "contrastive", "logit_scale"),
)
# transformers 5 saves a single tower without its prefix.
CLIP_VISION_PREFIXES = (*CLIP_PREFIXES, PrefixRule("", "vision"))
CLIP_TEXT_PREFIXES = (*CLIP_PREFIXES, PrefixRule("", "text"))
_PREFIXES = {
    "clip": CLIP_PREFIXES,
    "clip_vision_model": CLIP_VISION_PREFIXES,
    "clip_text_model": CLIP_TEXT_PREFIXES,
}


def open_clip(folder: Path, raw: dict, parts_dir: Path | None) -> ForeignCheckpoint:
    """Opens a CLIP model, or its vision or text tower."""
    kind = raw["model_type"]
    model = DreamLLMConfig(
        vision=None if kind == "clip_text_model" else ClipVisionConfig.from_hf(raw),
        text=None if kind == "clip_vision_model" else ClipTextConfig.from_hf(raw),
        contrastive=kind == "clip",
    )
    return open_folder("CLIP", folder, model, _PREFIXES[kind])


def find_clip(folder: Path, name: str, parts_dir: Path | None) -> Path | None:
    """Returns the folder of a CLIP that a checkpoint names, or None.

    It is searched in `parts_dir`, or else in the checkpoint's folder and beside it.
    """
    folders = [parts_dir] if parts_dir else [folder, folder.parent]
    candidates = [
        parent / n for parent in folders for n in (name, Path(name).name, "clip", "") if n or parts_dir
    ]
    for candidate in candidates:
        config = candidate / "config.json"
        if config.is_file() and str(read_json(config).get("model_type", "")).startswith("clip"):
            return candidate
    return None
