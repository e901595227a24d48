"""Compiles a program and reports what it needs and does."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from dreamllm_jax.aot.activations import activations
from dreamllm_jax.aot.census import take_census
from dreamllm_jax.aot.hlo import parse
from dreamllm_jax.aot.memory import DoesNotFit, measure, too_large
from dreamllm_jax.aot.program import LoweredProgram, compile_program
from dreamllm_jax.aot.report import CompileReport, to_json
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.atomic import atomic_write, write_text
from dreamllm_jax.config.chips import chip_of
from dreamllm_jax.config.train import Recipe


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
        if (reason := too_large(error)) is None:
            raise
        raise DoesNotFit(
            f"{recipe.name}, {program.name} does not fit on {topology}: {reason}; use more chips, raise "
            "optim.grad_accum_steps, or find settings that fit with --search."
        ) from error
    seconds, text = time.perf_counter() - begin, compiled.as_text()
    assert text is not None
    parsed = parse(text)
    census = take_census(parsed, program.mesh.shape)
    roof = roofline(census, math.fsum(program.model_flops.values()), program.mesh, chip)
    memory = measure(program.arguments, compiled, activations(parsed), chip)
    found = CompileReport(recipe.name, topology, effort, program, chip, memory, census, roof, seconds)
    return found, text


def write_report(found: CompileReport, text: str, folder: Path) -> None:
    """Writes the report as JSON and as a figure, and the compiled text, into a folder."""
    from dreamllm_jax.aot.plot import save_figure  # matplotlib is slow to import

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compile.json", json.dumps(to_json(found), indent=1) + "\n")
    write_text(folder / "program.hlo.txt", text)
    with atomic_write(folder / "compile.png") as beside:
        save_figure(found, beside)
