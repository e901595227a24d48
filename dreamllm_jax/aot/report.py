"""The report of a compilation, as JSON (`compile.json`) and as text."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.compilers import compiler_versions
from dreamllm_jax.aot.gpu_report import GpuReport, gpu_json, gpu_lines
from dreamllm_jax.aot.memory import FREE_SHARE, Memory, gib
from dreamllm_jax.aot.program import LoweredProgram
from dreamllm_jax.aot.roofline import Roofline
from dreamllm_jax.config.chips import Chip

LARGEST = 8  # number of collectives that are listed individually


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """Everything that is known about one compiled program. `seconds` is the time of compiling it.

    `gpu` is None for TPUs.
    """

    recipe: str
    topology: str
    effort: str
    program: LoweredProgram
    chip: Chip
    memory: Memory
    census: Census
    roofline: Roofline
    gpu: GpuReport | None
    seconds: float

    @property
    def compiled_flops(self) -> float:
        """FLOPs over all devices."""
        return self.census.total_flops * self.program.mesh.size


def to_json(report: CompileReport) -> dict[str, Any]:
    """Returns the report as plain JSON values. Bytes and seconds are of one chip, FLOPs of all chips."""
    chips, roof = report.program.mesh.size, report.roofline
    model = sum(report.program.model_flops.values())
    return {
        "recipe": report.recipe,
        "program": report.program.name,
        "topology": report.topology,
        "chip": report.chip.kind,
        "mesh": dict(report.program.mesh.shape),
        "compiler": {
            **compiler_versions(report.chip.kind),
            "effort": report.effort,
            "seconds": round(report.seconds, 1),
        },
        "memory": {
            "bytes": report.memory.kinds,
            "used": report.memory.used,
            "hbm": report.memory.hbm,
            "free": report.memory.free,
            "fits": report.memory.fits,
            "host": report.memory.host,
        },
        "model_flops": report.program.model_flops,
        "compiled_flops": {part: n * chips for part, n in report.census.flops.items()},
        "compiled_to_model": report.compiled_flops / model if model else None,
        "memory_traffic": report.census.hbm,
        "gpu": None if report.gpu is None else gpu_json(report.gpu),
        "loops_counted_once": report.census.data_dependent_loops,
        "collectives": [
            {"kind": kind, "axes": list(axes), "times": times, "bytes": received}
            for (kind, axes), (times, received) in by_kind(report.census).items()
        ],
        "largest_collectives": [_listed(c) for c in largest(report.census)],
        "roofline": {
            "seconds": roof.seconds,
            "limit": roof.limit,
            "bound": roof.bound,
            "serial": roof.serial,
            "mfu": roof.mfu(roof.bound),
            "mfu_serial": roof.mfu(roof.serial),
        },
    }


def by_kind(census: Census) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
    """Returns (kind, mesh axes) -> (times, bytes that a device receives), the most bytes first."""
    found = collections.defaultdict(lambda: (0.0, 0.0))
    for c in census.collectives:
        times, received = found[c.kind, c.axes]
        found[c.kind, c.axes] = (times + c.times, received + c.received)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def largest(census: Census) -> list[Collective]:
    """Returns the collectives that move most, merging those of the same operation."""
    found: dict[tuple, Collective] = {}
    for c in census.collectives:
        key = (c.kind, c.axes, c.shapes, c.source)
        before = found[key].times if key in found else 0.0
        found[key] = dataclasses.replace(c, times=before + c.times)
    return sorted(found.values(), key=lambda c: -c.received)[:LARGEST]


def _listed(c: Collective) -> dict[str, Any]:
    return {
        "kind": c.kind,
        "axes": list(c.axes),
        "times": c.times,
        "bytes": c.received,
        "shapes": [f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in c.shapes],
        "source": c.source,
    }


def to_text(report: CompileReport) -> str:
    """Returns the report as text."""
    memory, roof, program = report.memory, report.roofline, report.program
    mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items() if size > 1) or "1 chip"
    lines = [
        f"{report.recipe}, {program.name} on {report.topology} ({program.mesh.size} x "
        f"{report.chip.kind}), mesh {mesh}; compiled in {report.seconds:.0f} s, effort {report.effort}",
        "",
        *memory_lines(memory),
        "",
        *_work(report),
        "",
        f"bytes between a chip and its memory: {gib(report.census.hbm)}",
        *([] if report.gpu is None else gpu_lines(report.gpu, report.census.total_flops)),
        "",
        *_transfers(report.census),
        "",
        *_bound(roof),
    ]
    return "\n".join(lines)


def memory_lines(memory: Memory) -> list[str]:
    """Returns the memory of a chip as lines of text."""
    lines = [
        f"memory of a chip: {gib(memory.used)} of {gib(memory.hbm)}, {memory.free:.0%} free "
        f"({'fits' if memory.fits else 'does not fit'}: {FREE_SHARE:.0%} must stay free)",
        *[f"  {kind:<16}{gib(n):>14}" for kind, n in memory.kinds.items() if n],
    ]
    if memory.host:
        lines.append(f"  {'on the host':<16}{gib(memory.host):>14}")
    return lines


def _work(report: CompileReport) -> list[str]:
    model, chips = report.program.model_flops, report.program.mesh.size
    compiled = {part: n * chips for part, n in report.census.flops.items()}
    lines = [f"{'FLOPs of all chips':<18}{'model':>14}{'compiled':>14}{'ratio':>8}"]
    for part in dict.fromkeys([*model, *compiled]):
        lines.append(_flops_row("  " + part, model, compiled, part))
    totals = {"all": math.fsum(model.values())}, {"all": math.fsum(compiled.values())}
    lines.append(_flops_row("  all", *totals, "all"))
    if report.compiled_flops < 0.8 * sum(model.values()):
        lines.append(
            "  less than the model's work: products of few rows bypass the matrix unit and are not counted"
        )
    if report.census.data_dependent_loops:
        lines.append("  a loop whose length depends on data is counted as one iteration")
    return lines


def _flops_row(title: str, model: Mapping[str, float], compiled: Mapping[str, float], part: str) -> str:
    here, there = (n[part] if part in n else 0.0 for n in (model, compiled))
    ratio = f"{there / here:.2f}" if here and there else ""
    return f"{title:<18}{here:>14.4g}{there:>14.4g}{ratio:>8}"


def _transfers(census: Census) -> list[str]:
    if not census.collectives:
        return ["no collectives"]
    lines = [f"{'collectives':<22}{'mesh axes':<20}{'times':>8}{'received by a chip':>20}"]
    for (kind, axes), (times, received) in by_kind(census).items():
        lines.append(f"  {kind:<20}{'+'.join(axes):<20}{times:>8.0f}{gib(received):>20}")
    lines.append("the largest:")
    for c in largest(census):
        shapes = ", ".join(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in c.shapes[:2])
        more = f" and {len(c.shapes) - 2} more" if len(c.shapes) > 2 else ""
        lines.append(f"  {gib(c.received):>12}  {c.kind} {c.times:.0f} x {shapes}{more}  {_tail(c.source)}")
    return lines


def _tail(source: str) -> str:
    """Returns the end of an operation's name, without the names of transformations."""
    parts = [p for p in source.split("/") if p not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(parts[-4:])


def _bound(roof: Roofline) -> list[str]:
    lines = ["seconds at the chip's peaks:"]
    for name, seconds in sorted(roof.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<16}{seconds:>12.4g}")
    return [
        *lines,
        f"lower bound: {roof.bound:.4g} s ({roof.limit}), MFU {roof.mfu(roof.bound):.1%}; "
        f"without overlap: {roof.serial:.4g} s, MFU {roof.mfu(roof.serial):.1%}",
    ]
