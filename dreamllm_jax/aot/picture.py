"""The picture of a compilation: memory, FLOPs, seconds and collectives as bars."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dreamllm_jax.aot.memory import FREE, gib
from dreamllm_jax.aot.report import Finding, by_kind

WIDTH, LEFT, RIGHT, ROW, GAP = 1200, 300, 190, 30, 26
INK, PALE, LINE = (34, 38, 46), (226, 229, 235), (200, 60, 50)
COLORS = (
    (68, 114, 196),
    (112, 173, 71),
    (237, 153, 49),
    (91, 177, 207),
    (160, 108, 190),
    (192, 80, 77),
    (140, 140, 140),
    (190, 165, 90),
    (60, 70, 95),
)


def draw(finding: Finding) -> Image.Image:
    """Four groups of bars, each to its own scale."""
    sections = [_flops(finding), _seconds(finding), _collectives(finding)]
    rows = sum(len(bars) for _, bars in sections)
    height = 200 + ROW * len(finding.memory.kinds) + rows * ROW + len(sections) * (ROW + GAP)
    image = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    program = finding.program
    title = f"{finding.recipe}, {program.name} on {finding.topology}"
    pen.text((24, 16), title, INK, _font(26))
    roof = finding.roofline
    pen.text(
        (24, 52),
        f"bound {roof.bound:.3g} s ({roof.limit}), MFU {roof.mfu(roof.bound):.0%};  mesh "
        + ", ".join(f"{k} {v}" for k, v in program.mesh.shape.items()),
        INK,
        _font(18),
    )
    y = _memory(pen, finding, 92)
    for heading, bars in sections:
        y = _bars(pen, heading, bars, y + GAP)
    return image


def _memory(pen: ImageDraw.ImageDraw, finding: Finding, y: int) -> int:
    """One bar of all kinds up to what a chip has, and a legend; a line where too much is used."""
    memory = finding.memory
    pen.text((24, y), "Memory of a chip", INK, _font(20))
    y += ROW
    room, most = WIDTH - LEFT - RIGHT, max(memory.hbm, memory.used)
    scale = room / most
    pen.rectangle((LEFT, y, LEFT + memory.hbm * scale, y + ROW - 6), PALE)
    x = float(LEFT)
    for color, n in zip(_colors(len(memory.kinds)), memory.kinds.values(), strict=True):
        pen.rectangle((x, y, x + n * scale, y + ROW - 6), color)
        x += n * scale
    limit = LEFT + memory.hbm * (1 - FREE) * scale
    pen.line((limit, y - 4, limit, y + ROW - 2), LINE, 3)
    pen.text((24, y), f"{gib(memory.used)} of {gib(memory.hbm)}", INK, _font(16))
    pen.text((LEFT + room + 10, y), f"{memory.free:.0%} free", INK, _font(16))
    y += ROW
    for color, (kind, n) in zip(_colors(len(memory.kinds)), memory.kinds.items(), strict=True):
        pen.rectangle((LEFT, y + 4, LEFT + 16, y + 20), color)
        pen.text((LEFT + 28, y), f"{kind}  {gib(n)}", INK, _font(16))
        y += ROW
    return y


def _flops(finding: Finding) -> tuple[str, list[tuple[str, float, str]]]:
    bars = [(f"model, {k}", n, f"{n:.3g}") for k, n in finding.program.model_flops.items()]
    chips, compiled = finding.program.mesh.size, finding.census.flops
    for part in dict.fromkeys([*finding.program.model_flops, *compiled]):
        if part in compiled:
            n = compiled[part] * chips
            bars.append((f"compiled, {part}", n, f"{n:.3g}"))
    return "FLOPs of all chips", bars


def _seconds(finding: Finding) -> tuple[str, list[tuple[str, float, str]]]:
    seconds = sorted(finding.roofline.seconds.items(), key=lambda item: -item[1])
    return "Seconds at the chip's peaks", [(name, n, f"{n:.3g} s") for name, n in seconds]


def _collectives(finding: Finding) -> tuple[str, list[tuple[str, float, str]]]:
    bars = [
        (f"{kind}, {'+'.join(axes)}", n, gib(n)) for (kind, axes), (_, n) in by_kind(finding.census).items()
    ]
    return "What a chip takes in by collectives", bars


def _bars(pen: ImageDraw.ImageDraw, heading: str, bars: Sequence[tuple[str, float, str]], y: int) -> int:
    pen.text((24, y), heading, INK, _font(20))
    y += ROW
    most = max((n for _, n, _ in bars), default=0.0) or 1.0
    for name, n, said in bars:
        end = LEFT + n / most * (WIDTH - LEFT - RIGHT)
        pen.text((24, y), name, INK, _font(16))
        pen.rectangle(
            (LEFT, y, max(end, LEFT + 1), y + ROW - 8), COLORS[2 if name.startswith("model") else 0]
        )
        pen.text((end + 10, y), said, INK, _font(16))
        y += ROW
    return y


def _colors(number: int) -> list[tuple[int, int, int]]:
    return [COLORS[i % len(COLORS)] for i in range(number)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
