"""`Document`: text and images in reading order, what users pass in and get back."""

from __future__ import annotations

import dataclasses
import html
import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Strings and PIL images in reading order: what a prompt may be, and what the model writes.

    Iterating yields the parts in order. Displayed in a notebook it shows itself as HTML.
    `finish_reason` says of a generated document why it ends: "stop" (the model ended it) or
    "length" (no room was left); None for any other.
    """

    parts: tuple[str | Image.Image, ...] = ()
    finish_reason: str | None = None

    def __init__(
        self, parts: Sequence[str | Image.Image] | Image.Image = (), finish_reason: str | None = None
    ):
        if isinstance(parts, str | Image.Image):
            parts = (parts,)
        for i, part in enumerate(parts):
            if not isinstance(part, str | Image.Image):
                raise ValueError(
                    f"Part {i} of the document is a {type(part).__name__}; a document holds strings "
                    "and PIL images, for example Document([image, 'Which digit is this?'])."
                )
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "finish_reason", finish_reason)

    def __iter__(self) -> Iterator[str | Image.Image]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]

    def __eq__(self, other) -> bool:
        return isinstance(other, Document) and self.parts == other.parts

    def __add__(self, other: Document) -> Document:
        return Document(self.parts + other.parts)

    @property
    def text(self) -> str:
        """All text, the parts joined by a single space."""
        return " ".join(p.strip() for p in self.parts if isinstance(p, str) and p.strip())

    @property
    def images(self) -> list[Image.Image]:
        return [p for p in self.parts if not isinstance(p, str)]

    def __repr__(self) -> str:
        shown = [p if isinstance(p, str) else f"<image {p.width}x{p.height}>" for p in self.parts]
        return f"Document({shown!r})"

    def to_html(self, scale: int = 1) -> str:
        """The document as an HTML fragment with its pictures inside, each pixel `scale` wide."""
        return "".join(
            f'<span style="white-space:pre-wrap">{html.escape(p)}</span> '
            if isinstance(p, str)
            else image_html(p, scale)
            for p in self.parts
        )

    def _repr_html_(self) -> str:
        smallest = min((min(p.size) for p in self.images), default=256)
        return f"<p>{self.to_html(max(1, 64 // smallest))}</p>"

    def save_html(self, path: str | Path) -> None:
        """Writes one self-contained page."""
        Path(path).write_text(
            f'<!doctype html><meta charset="utf-8"><title>Document</title>{self._repr_html_()}\n',
            encoding="utf-8",
        )


def image_html(image: Image.Image, scale: int = 1) -> str:
    """An `<img>` element that carries the picture itself (PNG, base64)."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # what PNG has no form for
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="" width="{image.width * scale}" height="{image.height * scale}" '
        f'style="image-rendering:pixelated;vertical-align:middle" src="data:image/png;base64,{data}">'
    )
