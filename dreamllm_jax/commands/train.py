"""`dreamllm train`: trains a recipe through its stages."""

from __future__ import annotations

import argparse
from pathlib import Path

from dreamllm_jax.commands.command import OK, Command
from dreamllm_jax.commands.completion import FILES, FOLDERS, completes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("--config", required=True, help="recipe file, e.g. configs/stage2.py[:ARG]"), FILES)
    completes(add("--workdir", required=True, help="folder for checkpoints, logs and models"), FOLDERS)
    add("--until", metavar="STAGE", help="stop after the stage of this name")


def run(options: argparse.Namespace) -> int:
    from dreamllm_jax import distributed

    distributed.initialize()  # before anything that asks JAX for its devices
    from dreamllm_jax.config.recipe_files import load_recipe
    from dreamllm_jax.convert.opening import open_model
    from dreamllm_jax.generate.api import DreamLLM
    from dreamllm_jax.train.loop import train

    recipe = load_recipe(options.config, options.overrides)
    model = train(recipe, Path(options.workdir), options.until, open_model, DreamLLM)
    distributed.print_on_main(f"trained: {model}")
    return OK


COMMAND = Command(
    name="train",
    summary="train a recipe through its stages",
    description="Trains a recipe through its stages. The same command resumes a run that was interrupted.\n\n"
    "--config.KEY=VALUE changes any setting of the recipe: --config.seed=1,\n"
    "--config.stages.stage2.steps=100.",
    examples=(
        "--config=examples/handwriting/config.py --workdir=run",
        "--config=configs/stage2.py --workdir=run --config.mesh.fsdp=16 --config.seed=1",
        "--config=configs/dreamllm_13b.py --workdir=run --until=stage1_creation",
    ),
    add_arguments=add_arguments,
    run=run,
    overrides=True,
)
