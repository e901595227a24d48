"""A model as a folder: `config.json`, the parameters in safetensors shards, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig, model_config
from dreamllm_jax.convert.shapes import expected_shapes
from dreamllm_jax.convert.storage import flatten, load_params, new_folder, save_params
from dreamllm_jax.data.tokenizer import Tokenizer

FORMAT = "dreamllm_jax"


class Pretrained(NamedTuple):
    """What such a folder holds; `params` are flat: path -> numpy array."""

    config: DreamLLMConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    generation: GenerationConfig


def save_pretrained(
    folder: str | Path,
    params: Mapping[str, Any],
    config: DreamLLMConfig,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
) -> None:
    """Writes the folder whole or not at all (beside, then renamed), in place of an older model there.

    Raises:
      ValueError: the folder holds something else than such a model.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _holds_model(folder):
        raise ValueError(f"{folder} holds something else than a saved model; give a new or empty folder.")
    with new_folder(folder, overwrite=True) as beside:
        save_params(beside, params)
        tokenizer.save(beside)
        content = {"format": FORMAT, "model": to_dict(config), "generation": to_dict(generation)}
        (beside / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _holds_model(folder: Path) -> bool:
    """Whether a folder was written by `save_pretrained`, and may be written anew."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "format" in content and content["format"] == FORMAT


def load_pretrained(folder: str | Path, dtype: str | None = None) -> Pretrained:
    """Reads a folder that `save_pretrained` wrote; `dtype` casts the floating parameters.

    Raises:
      ValueError: the folder is missing, foreign, incomplete or damaged.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {what}; give a folder written by save_pretrained or by a training run.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); the folder is damaged.") from error
    if not isinstance(content, dict) or "format" not in content or content["format"] != FORMAT:
        raise ValueError(
            f"{folder} holds another kind of checkpoint (config.json does not say format {FORMAT!r}); "
            "convert it first: python tools/convert_weights.py to-jax SRC DST."
        )
    missing = [key for key in ("model", "generation") if key not in content]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; the folder is damaged.")
    config = model_config(content["model"])
    generation = build(GenerationConfig, content["generation"], "generation")
    params = flatten(load_params(folder, dtype=dtype))
    return Pretrained(config, params, Tokenizer.load(folder), generation)


def check_whole(folder: str | Path, config: DreamLLMConfig, params: Mapping[str, Any]) -> None:
    """Checks that a folder's (flat) parameters are those of its config's model.

    Raises:
      ValueError: some are missing, misshapen or have no place in it, by name.
    """
    expected = expected_shapes(config)
    wrong = [f"{name} is missing" for name in expected.keys() - params.keys()]
    wrong += [f"{name} has no place in it" for name in params.keys() - expected.keys()]
    wrong += [
        f"{name} has shape {tuple(params[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in params and tuple(params[name].shape) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{folder} does not hold the model that its config.json describes: {'; '.join(sorted(wrong)[:5])}"
            f"{more}; the folder is incomplete or damaged."
        )
