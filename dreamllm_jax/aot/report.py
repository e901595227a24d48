"""What a compilation found, as numbers (`compile.json`) and as a table."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.chips import Chip
from dreamllm_jax.aot.memory import FREE, Memory, gib
from dreamllm_jax.aot.program import LoweredProgram
from dreamllm_jax.aot.roofline import Roofline

LARGEST = 8  # collectives that are listed one by one


@dataclasses.dataclass(frozen=True)
class Finding:
    """Everything about one compiled program."""

    recipe: str
    topology: str
    effort: str
    program: LoweredProgram
    chip: Chip
    memory: Memory
    census: Census
    roofline: Roofline
    seconds: float  # of compiling

    @property
    def compiled_flops(self) -> float:
        """FLOPs of all devices together."""
        return self.census.total_flops * self.program.mesh.size


def numbers(finding: Finding) -> dict[str, Any]:
    """The finding as plain JSON; bytes and seconds are of one chip, FLOPs of all."""
    chips, roof = finding.program.mesh.size, finding.roofline
    model = sum(finding.program.model_flops.values())
    return {
        "recipe": finding.recipe,
        "program": finding.program.name,
        "topology": finding.topology,
        "chip": finding.chip.kind,
        "mesh": dict(finding.program.mesh.shape),
        "compiler": {
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
            "effort": finding.effort,
            "seconds": round(finding.seconds, 1),
        },
        "memory": {
            "bytes": finding.memory.kinds,
            "used": finding.memory.used,
            "hbm": finding.memory.hbm,
            "free": finding.memory.free,
            "fits": finding.memory.fits,
            "host": finding.memory.host,
        },
        "model_flops": finding.program.model_flops,
        "compiled_flops": {part: n * chips for part, n in finding.census.flops.items()},
        "compiled_to_model": finding.compiled_flops / model if model else None,
        "loops_counted_once": finding.census.data_dependent_loops,
        "collectives": [
            {"kind": kind, "axes": list(axes), "times": times, "bytes": received}
            for (kind, axes), (times, received) in by_kind(finding.census).items()
        ],
        "largest_collectives": [_listed(c) for c in largest(finding.census)],
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
    """(kind, mesh axes) -> (how many, bytes that a device takes in), the heaviest first."""
    found = collections.defaultdict(lambda: (0.0, 0.0))
    for c in census.collectives:
        times, received = found[c.kind, c.axes]
        found[c.kind, c.axes] = (times + c.times, received + c.received)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def largest(census: Census) -> list[Collective]:
    """The collectives that move most, those of the same place in the program together."""
    found: dict[tuple, Collective] = {}
    for c in census.collectives:
        place = (c.kind, c.axes, c.shapes, c.source)
        before = found[place].times if place in found else 0.0
        found[place] = dataclasses.replace(c, times=before + c.times)
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


def table(finding: Finding) -> str:
    """What is printed."""
    memory, roof, program = finding.memory, finding.roofline, finding.program
    mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items() if size > 1) or "1 chip"
    lines = [
        f"{finding.recipe}, {program.name} on {finding.topology} ({program.mesh.size} x "
        f"{finding.chip.kind}), mesh {mesh}; compiled in {finding.seconds:.0f} s, effort {finding.effort}",
        "",
        f"memory of a chip: {gib(memory.used)} of {gib(memory.hbm)}, {memory.free:.0%} free "
        f"({'fits' if memory.fits else 'does not fit'}: {FREE:.0%} must stay free)",
        *[f"  {kind:<16}{gib(n):>14}" for kind, n in memory.kinds.items() if n],
    ]
    if memory.host:
        lines.append(f"  {'on the host':<16}{gib(memory.host):>14}")
    return "\n".join([*lines, "", *_work(finding), "", *_transfers(finding.census), "", *_bound(roof)])


def _work(finding: Finding) -> list[str]:
    model, chips = finding.program.model_flops, finding.program.mesh.size
    compiled = {part: n * chips for part, n in finding.census.flops.items()}
    lines = [f"{'FLOPs of all chips':<18}{'model':>14}{'compiled':>14}{'ratio':>8}"]
    for part in dict.fromkeys([*model, *compiled]):
        lines.append(_flops_row("  " + part, model, compiled, part))
    totals = {"all": sum(model.values())}, {"all": sum(compiled.values())}
    lines.append(_flops_row("  all", *totals, "all"))
    if finding.compiled_flops < 0.8 * sum(model.values()):
        lines.append(
            "  less than the model's work: products of few rows are not on the matrix unit, not counted"
        )
    if finding.census.data_dependent_loops:
        lines.append("  a loop that ends by what it computes is counted as one turn")
    return lines


def _flops_row(title: str, model: Mapping[str, float], compiled: Mapping[str, float], part: str) -> str:
    here, there = (n[part] if part in n else 0.0 for n in (model, compiled))
    ratio = f"{there / here:.2f}" if here and there else ""
    return f"{title:<18}{here:>14.4g}{there:>14.4g}{ratio:>8}"


def _transfers(census: Census) -> list[str]:
    if not census.collectives:
        return ["no collectives"]
    lines = [f"{'collectives':<22}{'mesh axes':<20}{'times':>8}{'a chip takes in':>18}"]
    for (kind, axes), (times, received) in by_kind(census).items():
        lines.append(f"  {kind:<20}{'+'.join(axes):<20}{times:>8.0f}{gib(received):>18}")
    lines.append("the largest:")
    for c in largest(census):
        shapes = ", ".join(f"{s.dtype}[{','.join(map(str, s.dims))}]" for s in c.shapes[:2])
        more = f" and {len(c.shapes) - 2} more" if len(c.shapes) > 2 else ""
        lines.append(f"  {gib(c.received):>12}  {c.kind} {c.times:.0f} x {shapes}{more}  {_tail(c.source)}")
    return lines


def _tail(source: str) -> str:
    """The end of an operation's name, without the names of transformations."""
    parts = [p for p in source.split("/") if p not in ("while", "body", "closed_call", "checkpoint")]
    return "/".join(parts[-4:])


def _bound(roof: Roofline) -> list[str]:
    lines = ["seconds at the chip's peaks:"]
    for name, seconds in sorted(roof.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<16}{seconds:>12.4g}")
    return [
        *lines,
        f"bound: {roof.bound:.4g} s ({roof.limit}), MFU {roof.mfu(roof.bound):.1%}; "
        f"nothing overlapping: {roof.serial:.4g} s, MFU {roof.mfu(roof.serial):.1%}",
    ]
