"""A model's folder: `config.json`, the parameters in safetensors shards, and the tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dreamllm_jax.atomic import new_folder
from dreamllm_jax.checkpoint.json_files import read_json, write_json
from dreamllm_jax.checkpoint.parallel_writing import write_sharded_in_parallel
from dreamllm_jax.checkpoint.parameter_files import (
    STEM,
    as_tensors,
    cast,
    check_disk_space,
    open_params,
    save_params,
)
from dreamllm_jax.checkpoint.tensors import Tensor, num_bytes
from dreamllm_jax.checkpoint.vocabulary import with_control_tokens
from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.model import AttentionConfig, DreamLLMConfig, GenerationConfig, model_config
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.distributed import barrier, is_main, is_multi_process, run_on_main, wait_for_file
from dreamllm_jax.models.parameters import parameter_shapes

FORMAT = "dreamllm_jax"


class Pretrained(NamedTuple):
    """What a model's folder holds. `params` are flat (path -> tensor) and unread."""

    config: DreamLLMConfig
    params: dict[str, Tensor]
    tokenizer: Tokenizer
    generation: GenerationConfig


def save_pretrained(
    folder: str | Path,
    params: Mapping[str, Any],
    config: DreamLLMConfig,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
) -> None:
    """Writes a model's folder. It appears complete or not at all, and replaces an older model's folder.

    All processes call this, and every one writes some of the parameters: see `parallel_writing`. Process 0
    writes the other files.

    Raises:
      ValueError: the folder holds something other than a saved model, or its disk has too little space.
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if not is_multi_process():
        return write_pretrained(folder, params, config, tokenizer, generation)
    with contextlib.ExitStack() as stack:
        tensors = as_tensors(params)

        def begin() -> str:
            beside = stack.enter_context(_replacement(folder))
            check_disk_space(beside, sum(num_bytes(tensor) for tensor in tensors.values()))
            return str(beside)

        beside = Path(run_on_main(begin))
        wait_for_file(beside)
        write_sharded_in_parallel(beside, STEM, tensors)
        if is_main():
            tokenizer.save(beside)
            write_config(beside, config, generation)
    barrier(f"{folder} is written")


def write_pretrained(
    folder: Path,
    params: Mapping[str, Any],
    config: DreamLLMConfig,
    tokenizer: Tokenizer,
    generation: GenerationConfig,
) -> None:
    """Does what `save_pretrained` does from one process, which can read all parameters by itself."""
    with _replacement(folder) as beside:
        save_params(beside, params)
        tokenizer.save(beside)
        write_config(beside, config, generation)


def _replacement(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """Returns a `new_folder` in place of an older model's folder.

    Raises:
      ValueError: the folder holds something other than a saved model.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _may_be_replaced(folder):
        raise ValueError(f"{folder} holds something other than a saved model; give a new or an empty folder.")
    return new_folder(folder, overwrite=True)


def write_config(
    folder: Path, config: DreamLLMConfig, generation: GenerationConfig, loss: LossConfig | None = None
) -> None:
    """Writes the `config.json` of a model's folder; `loss` is kept for an export to PyTorch."""
    # Attention kernels belong to the machine that trains, not to the model.
    config = dataclasses.replace(config, attention=AttentionConfig())
    content = {"format": FORMAT, "model": to_dict(config), "generation": to_dict(generation)}
    if loss is not None:
        content["loss"] = to_dict(loss)
    write_json(folder / "config.json", content)


def _may_be_replaced(folder: Path) -> bool:
    """Returns whether `save_pretrained` wrote the folder; a damaged config.json says that it did not."""
    try:
        return is_model_folder(folder)
    except (OSError, ValueError):
        return False


def open_pretrained(path: str | Path, dtype: str | None = None) -> Pretrained:
    """Opens a folder that `save_pretrained` wrote. Its parameters are not read yet; `dtype` converts them.

    `convert.opening.open_model` also opens checkpoints in PyTorch's formats and models on the hub.

    Raises:
      ValueError: the folder is missing, incomplete, damaged, or was not written by `save_pretrained`.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; give the folder of a saved model.")
    if not is_model_folder(folder):
        raise ValueError(
            f"{folder} was not written by save_pretrained; give the folder of a saved model, or convert it "
            "first: dreamllm convert to-jax SRC DST."
        )
    content = read_json(folder / "config.json")
    missing = [key for key in ("model", "generation") if key not in content]
    if missing:
        raise ValueError(f"{folder}/config.json lacks {' and '.join(missing)}; the folder is damaged.")
    generation = build(GenerationConfig, content["generation"], "generation", saved=True)
    params = cast(open_params(folder), dtype)
    config, params, tokenizer = with_control_tokens(
        model_config(content["model"], saved=True), params, folder
    )
    return Pretrained(config, params, tokenizer, generation)


def is_model_folder(folder: Path) -> bool:
    """Returns whether the folder's config.json says that `save_pretrained` (or a conversion) wrote it."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    return "format" in content and content["format"] == FORMAT


def check_complete(folder: str | Path, config: DreamLLMConfig, params: Mapping[str, Any]) -> None:
    """Checks that a folder's parameters (flat) are exactly those of its config's model.

    Raises:
      ValueError: a parameter is missing, has another shape, or does not belong to the model.
    """
    expected = parameter_shapes(config)
    wrong = [f"{name} is missing" for name in expected.keys() - params.keys()]
    wrong += [f"{name} does not belong to it" for name in params.keys() - expected.keys()]
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
