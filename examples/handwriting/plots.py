"""Small line charts of a stage's records, as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Number = int | float

WIDTH, HEIGHT = 3.1, 1.8  # inches
# Readable on a light page and on a dark one.
CURVE, INK, GRID = "#3f7ae0", "#7a8496", "#8a93a340"
# Values that span more than this factor are shown on a logarithmic axis.
LOGARITHMIC_FROM = 20
SMOOTHING = 0.8
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "charts",
}


def line_chart(
    title: str, steps: Sequence[Number], values: Sequence[Number], may_be_logarithmic: bool = False
) -> bytes:
    """Returns an SVG of values over steps and their moving average, whose last value stands beside the title.

    Values that are not finite are left out. The lines have the ids `raw` and `smooth`.
    """
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", color=INK, fontweight="bold")
        if points:
            _plot(axes, [x for x, _ in points], [y for _, y in points], may_be_logarithmic)
        else:
            axes.text(0.5, 0.5, "no values", ha="center", color=INK, transform=axes.transAxes)
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _plot(axes, steps: list[Number], values: list[Number], may_be_logarithmic: bool) -> None:
    smoothed, low, high = moving_average(values), min(values), max(values)
    axes.plot(steps, values, color=CURVE, linewidth=0.7, alpha=0.35, gid="raw")
    axes.plot(steps, smoothed, color=CURVE, linewidth=1.6, gid="smooth")
    if may_be_logarithmic and low > 0 and high / low > LOGARITHMIC_FROM:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=min(low, 0.0))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(f"{smoothed[-1]:.3g}", loc="right", color=INK, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK, width=0.5)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def moving_average(values: Sequence[Number]) -> list[float]:
    """Returns the exponential moving average with bias correction: equal values keep their value."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out
