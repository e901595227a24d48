"""The figure of a compilation: memory, FLOPs, seconds and collectives as horizontal bars."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreamllm_jax.aot.memory import FREE_SHARE, gib
from dreamllm_jax.aot.report import CompileReport, by_kind

Bars = list[tuple[str, float, str]]  # name, value, label
_COLORS = colormaps["tab10"].colors  # type: ignore[attr-defined]


def save_figure(report: CompileReport, path: Path) -> None:
    """Plots the report into a PNG file."""
    groups = {
        "FLOPs of all chips": _flops(report),
        "Seconds at the chip's peaks": _seconds(report),
        "Bytes that a chip receives": _collectives(report),
    }
    groups = {title: bars for title, bars in groups.items() if bars}
    heights = [2.2, *(0.5 + 0.32 * len(bars) for bars in groups.values())]
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)
    program, roof = report.program, report.roofline
    mesh = ", ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    figure.suptitle(
        f"{report.recipe}, {program.name} on {report.topology}\n"
        f"lower bound {roof.bound:.3g} s ({roof.limit}), MFU {roof.mfu(roof.bound):.0%}; mesh {mesh}"
    )
    _memory(axes[0, 0], report)
    for ax, (title, bars) in zip(axes[1:, 0], groups.items(), strict=True):
        _bars(ax, title, bars)
    figure.savefig(path, dpi=110, format="png")


def _memory(ax: Axes, report: CompileReport) -> None:
    """Plots one stacked bar of all kinds, with a line at the limit that leaves enough memory free."""
    memory, left = report.memory, 0.0
    for i, (kind, size) in enumerate(memory.kinds.items()):
        ax.barh(0, size, left=left, color=_COLORS[i % len(_COLORS)], label=f"{kind} {gib(size)}")
        left += size
    ax.axvline((1 - FREE_SHARE) * memory.hbm, color="black", linestyle="--")
    ax.set_xlim(0, max(memory.hbm, memory.used))
    ax.set_yticks([])
    ax.set_xticks([])
    ax.set_title(
        f"Memory of a chip: {gib(memory.used)} of {gib(memory.hbm)}, {memory.free:.0%} free", loc="left"
    )
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=8, frameon=False)


def _bars(ax: Axes, title: str, bars: Bars) -> None:
    names, values, labels = zip(*bars, strict=True)
    colors = [_COLORS[1] if name.startswith("model") else _COLORS[0] for name in names]
    drawn = ax.barh(range(len(bars)), values, color=colors)
    ax.bar_label(drawn, labels, padding=4, fontsize=8)
    ax.set_yticks(range(len(bars)), names, fontsize=9)
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.margins(x=0.15)
    ax.set_title(title, loc="left")


def _flops(report: CompileReport) -> Bars:
    bars = [(f"model, {part}", n, f"{n:.3g}") for part, n in report.program.model_flops.items()]
    chips, compiled = report.program.mesh.size, report.census.flops
    for part in dict.fromkeys([*report.program.model_flops, *compiled]):
        if part in compiled:
            n = compiled[part] * chips
            bars.append((f"compiled, {part}", n, f"{n:.3g}"))
    return bars


def _seconds(report: CompileReport) -> Bars:
    seconds = sorted(report.roofline.seconds.items(), key=lambda item: -item[1])
    return [(name, n, f"{n:.3g} s") for name, n in seconds]


def _collectives(report: CompileReport) -> Bars:
    found = by_kind(report.census).items()
    return [(f"{kind}, {'+'.join(axes)}", n, gib(n)) for (kind, axes), (_, n) in found]
