"""`dreamllm compile`: compiles a recipe's programs for TPUs and GPUs that are not attached (see `aot`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.atomic import write_text
from dreamllm_jax.commands.command import OK, Command, Failed
from dreamllm_jax.commands.completion import FILES, FOLDERS, completes

if TYPE_CHECKING:
    from dreamllm_jax.aot.report import CompileReport
    from dreamllm_jax.config.train import Recipe, StageConfig

# As in aot/program.py, which cannot be imported here: it imports JAX.
PROGRAMS = ("train", "prefill", "decode", "denoise")
EFFORTS = ("low", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("--config", required=True, help="recipe file, e.g. configs/stage2.py[:ARG]"), FILES)
    add(
        "--topology",
        required=True,
        help="a TPU slice, v5p:4x4x4; two, v5p:4x4x4*2; a host of 8 GPUs, h100:8; four hosts, h100:8*4",
    )
    add("--stage", help="a stage of the recipe (default: its first)")
    add("--program", choices=PROGRAMS, default="train", help="default: train")
    add("--batch-size", type=int, default=8, help="prompts or images in a generation program (default: 8)")
    add("--quantize", choices=("int8",), help="round the language model's weights in a generation program")
    add(
        "--effort",
        choices=EFFORTS,
        default="low",
        help="effort of the TPU's compiler; full is what a run uses and takes 8 times as long (default: low)",
    )
    add(
        "--search",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="search for the fastest mesh, gradient accumulation and remat that fit, in at most N "
        "compilations (default: 3)",
    )
    completes(
        add("--out", type=Path, help="folder for compile.json, compile.png and program.hlo.txt"), FOLDERS
    )


def run(options: argparse.Namespace) -> int:
    import jax

    # A program for described devices cannot be loaded from JAX's compilation cache.
    jax.config.update("jax_enable_compilation_cache", False)
    from dreamllm_jax.aot import compilation
    from dreamllm_jax.aot.memory import DoesNotFit, NoText, does_not_fit
    from dreamllm_jax.aot.program import generation_program, train_program
    from dreamllm_jax.aot.report import to_text
    from dreamllm_jax.aot.topology import topology_devices
    from dreamllm_jax.config.recipe_files import load_recipe

    recipe = load_recipe(options.config, options.overrides)
    stage = recipe.stages[0] if options.stage is None else recipe.stage(options.stage)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size}: give at least 1.")
    if options.quantize is not None and options.program == "train":
        raise ValueError(
            f"--quantize={options.quantize} is for generation: give --program=decode or prefill."
        )
    devices = topology_devices(options.topology)
    if options.search is not None:
        return _search(options, recipe, stage, devices)
    if options.program == "train":
        program = train_program(recipe, stage, devices)
    else:
        program = generation_program(recipe, options.program, options.batch_size, devices, options.quantize)
    try:
        found, text = compilation.compile_and_report(recipe, program, options.topology, options.effort)
    except DoesNotFit as error:
        raise Failed(str(error)) from error
    except NoText as error:
        print(error.known, flush=True)
        raise Failed(str(error)) from error
    print(to_text(found), flush=True)
    if options.out is not None:
        compilation.write_report(found, text, options.out)
    if not found.memory.fits:
        raise Failed(f"{recipe.name}, {program.name} {does_not_fit(options.topology, found.memory)}")
    return OK


def _search(options: argparse.Namespace, recipe: Recipe, stage: StageConfig, devices: list[Any]) -> int:
    from dreamllm_jax.aot.compilation import compile_and_report
    from dreamllm_jax.aot.program import train_program
    from dreamllm_jax.aot.search import search
    from dreamllm_jax.aot.search_report import search_summary, search_to_json
    from dreamllm_jax.config.chips import chip_of

    if options.search < 1 or options.program != "train":
        raise ValueError(
            f"--search={options.search} --program={options.program}: --search must be at least 1, and "
            "supports only --program=train."
        )

    def compiled(recipe: Recipe, stage: StageConfig) -> CompileReport:
        program = train_program(recipe, stage, devices)
        return compile_and_report(recipe, program, options.topology, options.effort)[0]

    def log(line: str) -> None:
        print(line, flush=True)

    chip = chip_of(devices[0].device_kind)
    found = search(recipe, stage, devices, chip, options.search, compiled, log)
    log(search_summary(found, stage, chip))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "search.json", json.dumps(search_to_json(found, stage), indent=1) + "\n")
    if found.best is None:
        raise Failed(
            f"{recipe.name}, {stage.name}: none of the {len(found.trials)} compiled candidates fits on "
            f"{options.topology}; give --search more than {options.search}, or take more chips."
        )
    return OK


COMMAND = Command(
    name="compile",
    summary="compile a recipe's programs for TPUs and GPUs that are not attached",
    description="Compiles the exact train step of a recipe, or a program of its generation, for a\n"
    "described TPU slice or hosts of GPUs. It needs the compiler of the TPU (libtpu) or of the\n"
    "GPU (JAX's CUDA plugin) and neither TPU nor GPU: pip install 'dreamllm-jax[aot]'. It\n"
    "reports the memory of a chip by kind, model and compiled FLOPs, collectives, the shortest\n"
    "time that the program can take and, for GPUs, the kernels that it launches.\n\n"
    "--config.KEY=VALUE changes any setting of the recipe: --config.mesh.fsdp=16.",
    examples=(
        "--config=configs/stage2.py --topology=v5p:4x4x4",
        "--config=configs/stage2.py --topology=v5e:16x16 --program=decode --out=report",
        "--config=configs/stage2.py --topology=v5p:4x4x4 --search 5",
        "--config=configs/stage2.py --topology=h100:8 --config.mesh.data=1 --config.mesh.fsdp=8",
    ),
    add_arguments=add_arguments,
    run=run,
    overrides=True,
)
