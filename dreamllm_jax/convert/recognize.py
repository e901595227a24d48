"""Recognizes foreign checkpoints: a folder or file in PyTorch's formats becomes a `ForeignCheckpoint`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamllm_jax.checkpoint.json_files import read_json
from dreamllm_jax.checkpoint.parameter_files import INDEX_FILE
from dreamllm_jax.convert.adapters.clip import open_clip
from dreamllm_jax.convert.adapters.diffusers_folder import open_diffusers
from dreamllm_jax.convert.adapters.dreamllm import open_dreamllm
from dreamllm_jax.convert.adapters.llama import open_llama
from dreamllm_jax.convert.adapters.llava import open_llava, open_llava_port
from dreamllm_jax.convert.adapters.single_file import open_single_file
from dreamllm_jax.convert.foreign import ForeignCheckpoint

# The adapter of each kind of config.json. A new family is one file in `adapters` and one line here.
ADAPTERS: dict[str, Callable[[Path, dict[str, Any], Path | None], ForeignCheckpoint]] = {
    "dreamllm": open_dreamllm,
    "llama": open_llama,
    "clip": open_clip,
    "clip_vision_model": open_clip,
    "clip_text_model": open_clip,
    "llava": open_llava_port,
    "llava_llama": open_llava,
}


def open_checkpoint(
    path: str | Path, parts_dir: str | Path | None = None, prediction_type: str | None = None
) -> ForeignCheckpoint:
    """Recognizes a checkpoint in one of PyTorch's formats, and opens it without reading its tensors.

    A folder may be a DreamLLM, LLaMA or Vicuna, CLIP, LLaVA-1.5 (release or port), or a Stable Diffusion of
    diffusers. A `.safetensors` file is taken as a Stable Diffusion.

    Args:
      parts_dir: folder with the configs of towers that the checkpoint only names.
      prediction_type: what a Stable Diffusion 2 in one file predicts ("epsilon" or "v_prediction").

    Raises:
      ValueError: the folder is unknown or incomplete, or has an unsupported option; it is named.
    """
    path, parts = Path(path), None if parts_dir is None else Path(parts_dir)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder of weights.")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            return open_single_file(path, prediction_type)
        raise ValueError(f"{path} is a file; give the folder that holds it, with its config.json.")
    if (path / INDEX_FILE).is_file():
        raise ValueError(
            f"{path} is already converted; use to-torch on it. (If it should be loaded: its config.json "
            "belongs to another model; restore the folder.)"
        )
    if (path / "unet" / "config.json").is_file():
        return _open_named(path, open_diffusers, path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has neither config.json nor unet/config.json; expected a folder of weights."
        )
    raw = read_json(path / "config.json")
    return _open_named(path, ADAPTERS[_kind(path, raw)], path, raw, parts)


def _open_named(path: Path, adapter: Callable[..., ForeignCheckpoint], *arguments: Any) -> ForeignCheckpoint:
    """Calls an adapter; a config that it cannot use becomes a ValueError that names the folder."""
    try:
        return adapter(*arguments)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: a config.json lacks the key {error}; the folder is incomplete.") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: a config.json has a value of an unexpected type ({error}).") from error


def _kind(path: Path, raw: dict) -> str:
    kind = str(raw["model_type"]) if "model_type" in raw else ""
    if raw.get("plugins_init_kwargs"):
        return "dreamllm"
    if raw.get("mm_vision_tower"):  # LLaVA's own releases call themselves llava, llava_llama or llama
        return "llava_llama"
    if kind not in ADAPTERS:
        raise ValueError(
            f"{path}/config.json says model_type={kind!r}; supported: {', '.join(sorted(ADAPTERS))}, and "
            "diffusers folders of Stable Diffusion."
        )
    return kind
