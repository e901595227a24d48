"""`dreamllm inspect`: reports what a folder of weights contains."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dreamllm_jax.commands.command import OK, Command
from dreamllm_jax.commands.completion import FOLDERS, completes

PREDICTION_TYPES = ("epsilon", "v_prediction")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    completes(parser.add_argument("source", metavar="SRC", type=Path, help="a folder or file"), FOLDERS)
    add_source_options(parser)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a foreign checkpoint is read."""
    add = parser.add_argument
    add(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the U-Net of a Stable Diffusion 2 in a single file predicts",
    )
    completes(add("--parts", type=Path, help="folder of the towers that SRC only names"), FOLDERS)


def avoid_accelerators() -> None:
    """Keeps JAX on the CPU; call it before JAX is imported. Weights are converted without JAX's devices."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run(options: argparse.Namespace) -> int:
    avoid_accelerators()
    from dreamllm_jax.convert.inspect import describe

    print(describe(options.source, options.parts, options.prediction_type))
    return OK


COMMAND = Command(
    name="inspect",
    summary="list the contents of a folder of weights, and what would not fit the model",
    description="Says what SRC is: its kind, the parameters of each tower, what is missing or ignored.\n"
    "Only headers are read.",
    examples=(
        "models/vicuna-7b-v1.5",
        "stages/3_stage3/model",
        "sd21.safetensors --prediction-type v_prediction",
    ),
    add_arguments=add_arguments,
    run=run,
)
