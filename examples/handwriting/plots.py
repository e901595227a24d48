"""Small line charts as inline SVG, drawn by hand: a page with them needs nothing from elsewhere.

Colors are left to the page's style sheet, by class: `grid`, `raw` (every value), `smooth` (their moving
average), and `text` for the words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

Number = int | float

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 24
# Values that span more than this factor are shown on a logarithmic axis.
LOGARITHMIC_FROM = 20
SMOOTHING = 0.8


def line_chart(
    title: str, steps: Sequence[Number], values: Sequence[Number], may_be_logarithmic: bool = False
) -> str:
    """An `<svg>` of values over steps, their moving average and its last; what is not finite is left out."""
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    heading = f'<text x="{LEFT}" y="15" class="title">{html.escape(title)}</text>'
    if not points:
        body = f'{heading}<text x="{LEFT}" y="{HEIGHT / 2:.0f}">no values</text>'
        return _svg(title, body)
    smoothed = moving_average([y for _, y in points])
    low, high = min(y for _, y in points), max(y for _, y in points)
    logarithmic = may_be_logarithmic and low > 0 and high / low > LOGARITHMIC_FROM
    marks = log_ticks(low, high) if logarithmic else ticks(min(low, 0.0), high)
    bend = math.log if logarithmic else float
    down = _axis(bend(min(marks[0], low)), bend(max(marks[-1], high)), HEIGHT - BOTTOM, TOP)
    across = _axis(points[0][0], points[-1][0], LEFT, WIDTH - RIGHT)
    grid = "".join(_level(down(bend(mark)), _short(mark)) for mark in marks)
    raw = [(across(x), down(bend(y))) for x, y in points]
    smooth = [(across(x), down(bend(y))) for (x, _), y in zip(points, smoothed, strict=True)]
    last = f'<text x="{WIDTH - RIGHT}" y="15" class="last" text-anchor="end">{_short(smoothed[-1])}</text>'
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 7}">{points[0][0]:.0f}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 7}" text-anchor="end">step {points[-1][0]:.0f}</text>'
    )
    return _svg(title, heading + last + grid + ends + _line(raw, "raw") + _line(smooth, "smooth"))


def moving_average(values: Sequence[Number]) -> list[float]:
    """Exponential, without the pull of its beginning."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(mean / weight)
    return out


def ticks(low: Number, high: Number, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / (most - 1)))
    step = next(power * f for f in (1, 2, 5, 10, 20) if power * f * (most - 1) >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: Number, high: Number) -> list[float]:
    """Powers of ten that enclose a range of positive numbers."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**i for i in range(first, last + 1)]


def _axis(low: Number, high: Number, start: Number, end: Number) -> Callable[[Number], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _level(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
    )


def _line(points: Sequence[tuple[float, float]], name: str) -> str:
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _short(value: Number) -> str:
    return f"{value:.3g}"


def _svg(title: str, body: str) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(title)}" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{body}</svg>'
    )
