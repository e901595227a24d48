"""Compiles a program and reports what it needs and does."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import jax

from dreamllm_jax.aot.activations import activations
from dreamllm_jax.aot.census import take_census
from dreamllm_jax.aot.compilers import compiler_versions
from dreamllm_jax.aot.gpu_report import gpu_report
from dreamllm_jax.aot.hlo import Thunk, parse, read_thunks
from dreamllm_jax.aot.memory import DoesNotFit, NoText, measure, too_large
from dreamllm_jax.aot.program import LoweredProgram, compile_program
from dreamllm_jax.aot.report import CompileReport, memory_lines, to_json
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.atomic import atomic_write, write_text
from dreamllm_jax.config.chips import Chip, chip_of
from dreamllm_jax.config.train import Recipe


def compile_and_report(
    recipe: Recipe, program: LoweredProgram, topology: str, effort: str
) -> tuple[CompileReport, str]:
    """Compiles a program; returns its report and the compiled text.

    Raises:
      DoesNotFit: the TPU's compiler gives no program, since it needs more memory than a chip has. For GPUs
        the report says so.
      NoText: the compiler gives a program, but not its text.
    """
    chip, begin = chip_of(program.mesh.devices.flat[0].device_kind), time.perf_counter()
    try:
        compiled, thunks = _compiled(program, effort)
    except Exception as error:
        if (reason := too_large(error)) is None:
            raise
        raise DoesNotFit(
            f"{recipe.name}, {program.name} does not fit on {topology}: {reason}; use more chips, raise "
            "optim.grad_accum_steps, or find settings that fit with --search."
        ) from error
    seconds = time.perf_counter() - begin
    text = written(compiled, program, chip, seconds)
    parsed = parse(text)
    census = take_census(parsed, program.mesh.shape)
    roof = roofline(census, math.fsum(program.model_flops.values()), program.mesh, chip)
    memory = measure(program.arguments, compiled, activations(parsed), chip)
    gpu = None if thunks is None else gpu_report(parsed, thunks)
    found = CompileReport(recipe.name, topology, effort, program, chip, memory, census, roof, gpu, seconds)
    return found, text


def _compiled(program: LoweredProgram, effort: str) -> tuple[jax.stages.Compiled, list[Thunk] | None]:
    """Returns the compiled program and, for GPUs, the order of its work."""
    if program.mesh.devices.flat[0].platform == "tpu":
        return compile_program(program, effort), None
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_program(program, effort, Path(folder))
        return compiled, read_thunks(Path(folder))


def written(compiled: jax.stages.Compiled, program: LoweredProgram, chip: Chip, seconds: float) -> str:
    """Returns the text of a program that was compiled in `seconds`.

    Raises:
      NoText: the compiler cannot write it out; the error knows the memory all the same.
    """
    try:
        text = compiled.as_text()
    except Exception as error:  # internal errors of the compiler, of several types
        memory = measure(program.arguments, compiled, 0.0, chip)
        versions = ", ".join(f"{name} {version}" for name, version in compiler_versions(chip.kind).items())
        raise NoText(
            f"{program.name} was compiled in {seconds:.0f} s, but FLOPs, collectives, the least time and the "
            f"activations' share of the memory are missing, because {versions} cannot write the program out: "
            f"{str(error).splitlines()[0]}",
            "\n".join(memory_lines(memory)),
        ) from error
    assert text is not None
    return text


def write_report(found: CompileReport, text: str, folder: Path) -> None:
    """Writes the report as JSON and as a figure, and the compiled text, into a folder."""
    from dreamllm_jax.aot.plot import save_figure  # matplotlib is slow to import

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compile.json", json.dumps(to_json(found), indent=1) + "\n")
    write_text(folder / "program.hlo.txt", text)
    with atomic_write(folder / "compile.png") as beside:
        save_figure(found, beside)
