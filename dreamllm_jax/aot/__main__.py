"""`python -m dreamllm_jax.compile --config=configs/stage2.py --topology=v5p:4x4x4`: compiles without chips.

The TPU's own compiler (libtpu, which needs no TPU) compiles a recipe's exact train step, or a program of its
generation, for a topology. The report has the memory of a chip by kind, the model's and the compiled FLOPs,
the collectives, and a lower bound of the time. Settings of the recipe can be overridden, for example
`--config.mesh.fsdp=16` or `--config.stages.stage2.optim.grad_accum_steps=4`. `--search` finds the mesh, the
gradient accumulation and the remat policies.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from dreamllm_jax.aot.activations import activations
from dreamllm_jax.aot.census import take_census
from dreamllm_jax.aot.chips import chip_of
from dreamllm_jax.aot.hlo import parse
from dreamllm_jax.aot.memory import FREE_SHARE, DoesNotFit, gib, measure, too_large
from dreamllm_jax.aot.program import (
    EFFORTS,
    GENERATION,
    LoweredProgram,
    compile_program,
    generation_program,
    train_program,
)
from dreamllm_jax.aot.report import CompileReport, to_json, to_text
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.aot.search import search
from dreamllm_jax.aot.search_report import search_summary, search_to_json
from dreamllm_jax.aot.topology import topology_devices
from dreamllm_jax.config.recipe_files import load_recipe
from dreamllm_jax.config.train import Recipe, StageConfig


def compile_and_report(
    recipe: Recipe, program: LoweredProgram, topology: str, effort: str
) -> tuple[CompileReport, str]:
    """Compiles a program; returns its report and the compiled text.

    Raises:
      DoesNotFit: the program needs more memory than a chip has.
    """
    chip, begin = chip_of(program.mesh.devices.flat[0].device_kind), time.perf_counter()
    try:
        compiled = compile_program(program, effort)
    except Exception as error:
        if (said := too_large(error)) is None:
            raise
        raise DoesNotFit(
            f"{recipe.name}, {program.name} does not fit on {topology}: {said}; take more chips, more "
            "optim.grad_accum_steps, or let --search look."
        ) from error
    seconds, text = time.perf_counter() - begin, compiled.as_text()
    parsed = parse(text)
    census = take_census(parsed, program.mesh.shape)
    roof = roofline(census, math.fsum(program.model_flops.values()), program.mesh, chip)
    memory = measure(program.arguments, compiled, activations(parsed), chip)
    found = CompileReport(recipe.name, topology, effort, program, chip, memory, census, roof, seconds)
    return found, text


def main() -> None:
    """Parses the command line and compiles. The exit code is 1 if the request is wrong or the program does
    not fit.
    """
    options, overrides = _parser().parse_known_args()
    try:
        _run(options, overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dreamllm_jax.compile", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, help="recipe file, e.g. configs/stage2.py[:ARG]")
    add("--topology", required=True, help="e.g. v5p:4x4x4, v5e:16x16, or v5p:4x4x4*2 for two slices")
    add("--stage", help="the recipe's stage of this name (default: its first)")
    add("--program", choices=("train", *GENERATION), default="train")
    add("--batch-size", type=int, default=8, help="prompts or images at once, for programs of generation")
    add(
        "--effort",
        choices=tuple(EFFORTS),
        default="low",
        help="full: as a training run compiles; takes 8 times as long",
    )
    add(
        "--search",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="find the fastest mesh, gradient accumulation and remat that fit, with up to N compilations (3)",
    )
    add("--out", type=Path, help="folder for compile.json, compile.png and program.hlo.txt")
    return parser


def _run(options: Any, overrides: list[str]) -> None:
    recipe = load_recipe(options.config, overrides)
    stage = recipe.stages[0] if options.stage is None else recipe.stage(options.stage)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size={options.batch_size}: give at least 1.")
    devices = topology_devices(options.topology)
    if options.search is not None:
        _search(options, recipe, stage, devices)
        return
    if options.program == "train":
        program = train_program(recipe, stage, devices)
    else:
        program = generation_program(recipe, options.program, options.batch_size, devices)
    found, text = compile_and_report(recipe, program, options.topology, options.effort)
    print(to_text(found), flush=True)
    if options.out is not None:
        write(found, text, options.out)
    if not found.memory.fits:
        raise ValueError(
            f"{recipe.name}, {program.name} does not fit on {options.topology}: {found.memory.free:.1%} of "
            f"a chip's {gib(found.memory.hbm)} stays free, and {FREE_SHARE:.0%} must."
        )


def _search(options: Any, recipe: Recipe, stage: StageConfig, devices: list[Any]) -> None:
    if options.search < 1 or options.program != "train":
        raise ValueError(f"--search={options.search}: give at least 1, and --program=train.")

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
        text = json.dumps(search_to_json(found, stage), indent=1) + "\n"
        (options.out / "search.json").write_text(text, encoding="utf-8")
    if found.best is None:
        raise ValueError(
            f"{recipe.name}, {stage.name}: none of the {len(found.trials)} compiled candidates fits on "
            f"{options.topology}; give --search more than {options.search}, or take more chips."
        )


def write(found: CompileReport, text: str, folder: Path) -> None:
    """Writes the report as JSON and as a figure, and the compiled text, into a folder."""
    from dreamllm_jax.aot.plot import save_figure  # matplotlib is slow to import

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compile.json").write_text(json.dumps(to_json(found), indent=1) + "\n", encoding="utf-8")
    (folder / "program.hlo.txt").write_text(text, encoding="utf-8")
    save_figure(found, folder / "compile.png")


def run() -> None:
    """Runs the command; programs of described devices cannot be loaded from JAX's compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    main()


if __name__ == "__main__":
    run()
