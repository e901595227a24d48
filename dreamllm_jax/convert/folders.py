"""The two conversions between folders: from PyTorch's formats to a saved model, and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dreamllm_jax.atomic import new_folder
from dreamllm_jax.checkpoint.json_files import read_json, write_json
from dreamllm_jax.checkpoint.model_folder import check_complete, write_config
from dreamllm_jax.checkpoint.parameter_files import (
    INDEX_FILE,
    cast,
    check_disk_space,
    open_params,
    progress_bar,
    save_params,
)
from dreamllm_jax.checkpoint.safetensors_files import SHARD_BYTES, write_sharded
from dreamllm_jax.checkpoint.tensors import DTYPES, Tensor, is_floating, num_bytes
from dreamllm_jax.checkpoint.vocabulary import check_tokenizer_fits, with_control_tokens
from dreamllm_jax.config.base import build
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig, model_config
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert import config_files
from dreamllm_jax.convert.adapters.dreamllm import FILES
from dreamllm_jax.convert.compose import init_connectors
from dreamllm_jax.convert.foreign import TOKENIZER_FILES, ForeignCheckpoint, control_ids
from dreamllm_jax.convert.hub_files import check_downloads
from dreamllm_jax.convert.mapping import Report, to_torch
from dreamllm_jax.convert.torch_files import require_torch, write_torch_file
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokenizer_files import has_tokenizer

Parts = Mapping[str, Mapping[str, Tensor]]
Step = Callable[[int], None]


def convert_to_jax(
    source: ForeignCheckpoint,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes `source` as a folder that `DreamLLM.from_pretrained` loads. It appears complete or not at all.

    Raises:
      ValueError: before anything is written, if tensors do not fit the model (all are named), files differ
        from what the hub sent, or the tokenizer belongs to another model.
    """
    params, report = source.params()
    report.raise_if_faulty(str(source.path))
    _check_target(folder, [source.path, *source.files])
    model, tokenizer = source.model, None
    if source.fresh:  # composed for training, so with everything that training needs
        connectors = init_connectors(model, source.fresh)
        params |= connectors
        report.made += [f"{path} {tensor.shape}, initialized" for path, tensor in connectors.items()]
        rows = model.llama.vocab_size if model.llama else 0
        model, params, tokenizer = with_control_tokens(model, params, source.folder)
        if model.llama is not None and model.llama.vocab_size > rows:
            more = f"{rows} to {model.llama.vocab_size - 1}"
            report.made.append(f"rows {more} of the vocabulary, for control tokens: the mean of the others")
    elif has_tokenizer(source.folder):
        check_tokenizer_fits(Tokenizer.load(source.folder, extend=True), model, source.folder)
    generation = GenerationConfig(template=source.template)
    check_downloads(source.files)
    with new_folder(folder, overwrite) as beside:
        save_params(beside, params, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
        if tokenizer is None:
            for file in source.tokenizer_files:
                shutil.copyfile(file, beside / file.name)
        else:
            tokenizer.save(beside)
        write_config(beside, model, generation, source.loss)
    return report


def convert_to_torch(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Writes a saved model in PyTorch's formats. The folder appears complete or not at all.

    With a language model `folder` itself loads as `transformers.LlamaForCausalLM` and, with the
    plugins' files, as the reference's DreamLLM; `clip/` loads as `CLIPVisionModel`, `sd/unet` and
    `sd/vae` with diffusers, `text/` as `CLIPTextModel`. Tensors are streamed, except those of the plugins'
    files: they are in memory one file at a time.

    Raises:
      ValueError: the source is not a converted folder or is damaged, or PyTorch is needed and not installed;
        before anything is written.
    """
    source = Path(source)
    params = cast(open_params(source), dtype)
    content = read_json(source / "config.json")
    if "model" not in content:
        raise ValueError(f"{source}/config.json does not describe a model; the folder is not a saved model.")
    model = model_config(content["model"], saved=True)
    loss = build(LossConfig, content["loss"], "loss", saved=True) if "loss" in content else LossConfig()
    check_complete(source, model, params)
    parts, report = to_torch(params)
    report.raise_if_faulty(str(source))
    tokens = _special_tokens(source, model)
    _check_target(folder, [source])
    if _has_plugins(model):
        require_torch()
    with new_folder(folder, overwrite) as beside:
        plan = _files(model, loss, parts, tokens)
        total = sum(num_bytes(t) for _, tensors, _ in plan for t in tensors.values())
        check_disk_space(beside, total)
        with progress_bar(total, f"writing {Path(folder).name}", progress) as step:
            for path, tensors, config in plan:
                _write(beside / path, tensors, config, shard_bytes, step)
        if model.unet is not None:
            home = beside / _diffusion_folder(model)
            write_json(
                _made(home / "scheduler" / "scheduler_config.json"),
                config_files.scheduler_json(model.schedule),
            )
        if model.vision is not None:
            home = beside if model.llama is None and model.unet is None else beside / "clip"
            write_json(home / "preprocessor_config.json", config_files.preprocessor_json(model.vision))
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, beside / name)
    return report


def _check_target(folder: str | Path, sources: Iterable[Path]) -> None:
    """Checks that `folder` may be replaced.

    Raises:
      ValueError: it contains a source of the conversion, or something that is not a model.
    """
    target = Path(folder).resolve()
    for source in sources:
        if source.resolve().is_relative_to(target):
            raise ValueError(f"{folder} contains the source of the conversion; write into another folder.")
    marks = (INDEX_FILE, "config.json", "unet/config.json")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in marks):
        raise ValueError(f"{folder} contains something other than a model; give a new or empty folder.")


def _files(
    model: DreamLLMConfig, loss: LossConfig, parts: Parts, tokens: Mapping[str, Any]
) -> list[tuple[str, dict[str, Tensor], dict[str, Any] | None]]:
    """Returns (path, tensors, config) for each folder of safetensors, and (path, tensors, None) for each
    `.bin` file.
    """
    plan: list[tuple[str, dict[str, Tensor], dict[str, Any] | None]] = []
    joint = _has_plugins(model)
    if model.llama is not None:
        dtype = _dtype(parts["llama"])
        config = (
            config_files.dreamllm_json(model, loss, dtype, tokens)
            if joint
            else config_files.llama_json(model.llama, dtype)
        )
        plan.append((".", dict(parts["llama"]), config))
    if joint:
        plan += [(f"{file}.bin", tensors, None) for file, tensors in _plugins(model, parts).items()]
    sole = model.llama is None and model.unet is None
    if model.vision is not None and not model.contrastive:
        tensors = {f"vision_model.{name}": t for name, t in parts["vision"].items()}
        config = config_files.clip_vision_json(model.vision, _dtype(tensors))
        plan.append(("." if sole else "clip", tensors, config))
    if model.contrastive:
        assert model.vision is not None and model.text is not None
        tensors = {f"vision_model.{name}": t for name, t in parts["vision"].items()}
        tensors |= {f"text_model.{name}": t for name, t in parts["text"].items()} | dict(parts["contrastive"])
        plan.append(
            (
                "." if sole else "clip",
                tensors,
                config_files.clip_json(model.vision, model.text, _dtype(tensors)),
            )
        )
    if model.unet is not None:
        assert model.vae is not None
        home = _diffusion_folder(model)
        plan.append((f"{home}/unet", dict(parts["unet"]), config_files.unet_json(model.unet)))
        plan.append((f"{home}/vae", dict(parts["vae"]), config_files.vae_json(model.vae)))
    if model.text is not None and not model.contrastive:
        tensors = {f"text_model.{name}": t for name, t in parts["text"].items()}
        path = "." if sole and model.vision is None else f"{_diffusion_folder(model)}/text_encoder"
        plan.append((path, tensors, config_files.clip_text_json(model.text, _dtype(tensors))))
    return plan


def _has_plugins(model: DreamLLMConfig) -> bool:
    """Returns whether the export is the reference's DreamLLM: a language model with other towers."""
    return model.llama is not None and (model.vision is not None or model.unet is not None)


def _plugins(model: DreamLLMConfig, parts: Parts) -> dict[str, dict[str, Tensor]]:
    """Returns the reference's plugin files, by the table with which they are read."""
    head = "stable_diffusion_xl_head" if "global_projector" in parts else "stable_diffusion_head"
    files: dict[str, dict[str, Tensor]] = {}
    for rule in FILES:
        if rule.file in ("clip_vision_embedding", "dream_embedding", head) and rule.part in parts:
            names = {f"{rule.prefix}{name}": tensor for name, tensor in parts[rule.part].items()}
            files.setdefault(rule.file, {}).update(names)
    return files


def _write(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, limit: int, step: Step
) -> None:
    if config is None:
        write_torch_file(path, tensors, step)
        return
    path.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"
    write_sharded(path, stem, tensors, limit, step)
    write_json(path / "config.json", config)


def _diffusion_folder(model: DreamLLMConfig) -> str:
    return "." if model.llama is None else "sd"


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the name of the weights' dtype in config.json."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    for tensor in tensors.values():
        if is_floating(tensor.dtype):
            return next((name for kind, name in names.items() if DTYPES[kind] == tensor.dtype), "float32")
    return "float32"


def _special_tokens(source: Path, model: DreamLLMConfig) -> dict[str, Any]:
    """Returns the ids of control tokens, which the reference's config.json repeats."""
    if model.llama is None or not has_tokenizer(source):
        return {}
    ids = control_ids(Tokenizer.load(source, extend=True))
    first = [name for name in ("<s>", "</s>", "<unk>", "[PAD]") if name in ids]
    named = {name: index for name, index in ids.items() if name not in first}
    return {**{name: ids[name] for name in first}, "additional_special_tokens": named}
