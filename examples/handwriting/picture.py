"""Draws documents that a trained model writes into one PNG:

    python -m examples.handwriting.picture --model=quickstart/checkpoint --output=docs/images/document.png

Each prompt is a line in grey, and the document that answers it the line below. The picture in the README
is made by this command.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, OffsetImage, TextArea, VPacker

from dreamllm_jax.atomic import atomic_write
from dreamllm_jax.document import Document
from dreamllm_jax.generate.api import DreamLLM

PROMPTS = ("Count from three to six.", "Write two plus five.", "Count from six to nine.")
INK, GREY, PAPER = "#1f2733", "#7a8496", "#ffffff"
FONT_SIZE, IMAGE_HEIGHT = 15, 44  # points
DPI, MARGIN = 160, 24  # dots per inch, dots


def main() -> None:
    """Writes the picture of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.handwriting.picture",
        description="Draws documents that a trained model writes into one PNG.",
    )
    parser.add_argument("--model", required=True, help="folder of a trained handwriting model")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT")
    arguments = parser.parse_args()
    model = DreamLLM.from_pretrained(arguments.model)
    written = model.generate_document(list(arguments.prompts))
    png = render(dict(zip(arguments.prompts, written, strict=True)))
    with atomic_write(arguments.output) as path:
        path.write_bytes(png)


def render(documents: Mapping[str, Document]) -> bytes:
    """Returns a PNG of prompts and the documents that answer them, in order.

    Args:
      documents: from prompt to document; each is drawn on one line, with images of IMAGE_HEIGHT points.
    """
    with rc_context({"font.family": "sans-serif", "font.size": FONT_SIZE}):
        lines: list[Artist] = []
        for prompt, document in documents.items():
            lines += [_text(prompt, GREY), _line(document)]
        page = VPacker(children=lines, pad=0, sep=FONT_SIZE * 0.6, align="left")
        figure = Figure(dpi=DPI, facecolor=PAPER)
        figure.add_artist(
            AnchoredOffsetbox("center", child=page, frameon=False, pad=0, bbox_to_anchor=figure.bbox)
        )
        extent = page.get_bbox(FigureCanvasAgg(figure).get_renderer())
        figure.set_size_inches((extent.width + 2 * MARGIN) / DPI, (extent.height + 2 * MARGIN) / DPI)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _line(document: Document) -> Artist:
    parts: list[Artist] = [
        _text(part.strip(), INK) if isinstance(part, str) else _image(part)
        for part in document
        if not isinstance(part, str) or part.strip()
    ]
    return HPacker(children=parts, pad=0, sep=FONT_SIZE * 0.6, align="center")


def _text(text: str, color: str) -> Artist:
    return TextArea(text, textprops={"color": color})


def _image(image) -> Artist:
    pixels = np.asarray(image.convert("RGB"))
    return OffsetImage(pixels, zoom=IMAGE_HEIGHT / pixels.shape[0], interpolation="nearest")


if __name__ == "__main__":
    main()
