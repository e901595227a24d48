"""`dreamllm convert`: converts weights between PyTorch's formats and ours."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dreamllm_jax.commands.command import OK, Command, CommandGroup
from dreamllm_jax.commands.completion import FILES, FOLDERS, completes
from dreamllm_jax.commands.inspect import add_source_options, avoid_accelerators

if TYPE_CHECKING:
    from dreamllm_jax.convert.foreign import ForeignCheckpoint

DTYPES = ("float32", "bfloat16", "float16")
TOWERS = {
    "llm": "take the language model from here (with its connectors, if their towers come along)",
    "vision": "take the vision tower from here: CLIP, or a model that contains one",
    "diffusion": "take U-Net and VAE from here: Stable Diffusion, or a model that contains them",
}


def add_to_jax_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of to-jax: SRC and DST, or DST and one option per tower to combine."""
    source = parser.add_argument("source", metavar="SRC", type=Path, nargs="?", help="PyTorch's weights")
    completes(source, FOLDERS)
    for tower, what in TOWERS.items():
        completes(parser.add_argument(f"--{tower}", type=Path, metavar="SRC", help=what), FILES)
    add_source_options(parser)
    _add_target(parser)


def add_to_torch_arguments(parser: argparse.ArgumentParser) -> None:
    completes(parser.add_argument("source", metavar="SRC", type=Path, help="a folder of ours"), FOLDERS)
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("target", metavar="DST", type=Path, help="the folder to write"), FOLDERS)
    add("--dtype", choices=DTYPES, help="cast to this dtype (default: keep each tensor's)")
    add("--shard-gb", type=float, default=5.0, help="size of the largest file, in GB (default: 5)")
    add("--overwrite", action="store_true", help="replace DST if it exists")
    add("--quiet", action="store_true", help="show no progress bar")


def to_jax(options: argparse.Namespace) -> int:
    """Converts a PyTorch checkpoint to a folder that `DreamLLM.from_pretrained` loads."""
    avoid_accelerators()
    from dreamllm_jax.convert.folders import convert_to_jax

    source = chosen_source(options)
    report = convert_to_jax(source, options.target, **_settings(options))
    print(f"converted {source.path} ({source.kind}) to {options.target}\n{report}")
    return OK


def to_torch(options: argparse.Namespace) -> int:
    """Converts our folder to folders that transformers, diffusers and the reference load."""
    avoid_accelerators()
    from dreamllm_jax.convert.folders import convert_to_torch

    convert_to_torch(options.source, options.target, **_settings(options))
    print(f"converted {options.source} to {options.target}, in PyTorch's formats")
    return OK


def _settings(options: argparse.Namespace) -> dict:
    return {
        "dtype": options.dtype,
        "shard_bytes": int(options.shard_gb * 1e9),
        "overwrite": options.overwrite,
        "progress": not options.quiet,
    }


def chosen_source(options: argparse.Namespace) -> ForeignCheckpoint:
    """Opens SRC, or combines the towers that are named one by one.

    Raises:
      ValueError: both SRC and towers are given, or neither; towers without --llm.
    """
    from dreamllm_jax.convert.compose import compose
    from dreamllm_jax.convert.recognize import open_checkpoint

    named = {name: path for name in TOWERS if (path := getattr(options, name)) is not None}
    if (options.source is not None) == bool(named):
        raise ValueError("give either SRC or the towers by --llm, --vision and --diffusion.")
    if options.source is not None:
        return open_checkpoint(options.source, options.parts, options.prediction_type)
    if "llm" not in named:
        raise ValueError("--vision and --diffusion join a language model: name it with --llm.")
    prediction = options.prediction_type
    return compose(**{name: open_checkpoint(path, options.parts, prediction) for name, path in named.items()})


TO_JAX = Command(
    name="to-jax",
    summary="write SRC as a folder that DreamLLM.from_pretrained loads",
    description="Writes SRC as a folder that DreamLLM.from_pretrained loads. SRC is recognized: a\n"
    "DreamLLM, LLaMA / Vicuna, LLaVA-1.5, CLIP or diffusers Stable Diffusion folder, or a\n"
    "Stable Diffusion in a single .safetensors file. Tensors are streamed: a model may be\n"
    "larger than memory.\n\n"
    "With --llm the towers of several sources become one model, the one that stage I starts\n"
    "from: control tokens join the vocabulary, and the connectors are initialized at random.",
    examples=(
        "models/dreamllm-7b-pytorch models/dreamllm-7b --dtype bfloat16",
        "models/start --llm VICUNA --vision CLIP --diffusion SD",
    ),
    add_arguments=add_to_jax_arguments,
    run=to_jax,
)
TO_TORCH = Command(
    name="to-torch",
    summary="write our folder SRC in the formats of transformers, diffusers and the reference",
    description="Writes our folder SRC as folders that transformers, diffusers and the reference load.\n"
    "Tensors are streamed: a model may be larger than memory. PyTorch is needed only for a\n"
    "whole DreamLLM: each of its plugins' files is written from memory.",
    examples=("models/dreamllm-7b models/dreamllm-7b-pytorch --dtype float16",),
    add_arguments=add_to_torch_arguments,
    run=to_torch,
)


COMMAND = CommandGroup(
    name="convert",
    summary="convert weights between PyTorch's formats and ours",
    description="Converts weights between PyTorch's formats and ours.",
    commands=(TO_JAX, TO_TORCH),
)
