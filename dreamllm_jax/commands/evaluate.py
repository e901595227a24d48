"""`dreamllm evaluate`: measures a model on held-out batches of a recipe's stage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dreamllm_jax.commands.command import OK, Command
from dreamllm_jax.commands.completion import FILES, FOLDERS, completes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("model", metavar="MODEL", help="a model's folder, or its id on the hub"), FOLDERS)
    completes(add("--config", required=True, help="recipe file, e.g. configs/stage2.py[:ARG]"), FILES)
    add("--stage", help="a stage of the recipe (default: its last)")
    add("--batches", type=int, default=8, metavar="N", help="number of held-out batches (default: 8)")
    completes(add("--out", type=Path, metavar="FILE", help="write the JSON here too"), FILES)


def run(options: argparse.Namespace) -> int:
    from dreamllm_jax import distributed

    distributed.initialize()  # before anything that asks JAX for its devices
    from dreamllm_jax.atomic import write_text
    from dreamllm_jax.config.recipe_files import load_recipe
    from dreamllm_jax.convert.opening import open_model
    from dreamllm_jax.evaluate.losses import held_out_losses

    if options.batches < 1:
        raise ValueError(f"--batches={options.batches}: give at least 1.")
    recipe = load_recipe(options.config, options.overrides)
    stage = recipe.stages[-1] if options.stage is None else recipe.stage(options.stage)
    result = held_out_losses(options.model, open_model(options.model), recipe, stage, options.batches)
    text = json.dumps(result, indent=1)
    if distributed.is_main():
        if not result["held_out"]:
            print(
                "warning: the stage reads files, and trains on these documents too; name other files in "
                "hooks.validation.",
                file=sys.stderr,
            )
        print(text, flush=True)
        if options.out is not None:
            write_text(options.out, f"{text}\n")
    distributed.barrier("evaluated")
    return OK


COMMAND = Command(
    name="evaluate",
    summary="measure a model's losses on held-out batches",
    description="Computes the losses of a model on N batches of a stage's data, with another seed than\n"
    "training's: next-token loss, perplexity and token accuracy of the supervised tokens, and\n"
    "the denoising loss of the images. It runs on the recipe's mesh, with several processes if\n"
    "there are any, and prints JSON. For a stage that reads files, name held-out files in\n"
    "hooks.validation.\n\n"
    "--config.KEY=VALUE changes any setting of the recipe: --config.seed=1.",
    examples=(
        "stages/3_stage3/model --config=configs/stage3.py",
        "models/dreamllm-7b --config=configs/stage2.py --batches=32 --out=losses.json --config.mesh.fsdp=8",
    ),
    add_arguments=add_arguments,
    run=run,
    overrides=True,
)
