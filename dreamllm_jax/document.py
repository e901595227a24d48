"""`Document`: text and images in reading order, as prompts and as generated output."""

from __future__ import annotations

import dataclasses
import functools
import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from PIL import Image

from dreamllm_jax.atomic import write_text


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Strings and PIL images in reading order: a prompt, or what the model wrote.

    Iteration yields the parts in order. A notebook displays the document as HTML. `finish_reason` says why a
    generated document ends: "stop" (the model ended it) or "length" (no room was left). Others have None.

    Example: `Document([image, "Which digit is this?"])`.

    Raises:
      ValueError: a part is neither a string nor a PIL image.
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

    @overload
    def __getitem__(self, index: int) -> str | Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str | Image.Image, ...]: ...
    def __getitem__(self, index: int | slice) -> str | Image.Image | tuple[str | Image.Image, ...]:
        return self.parts[index]

    def __eq__(self, other) -> bool:
        return isinstance(other, Document) and self.parts == other.parts

    def __add__(self, other: Document) -> Document:
        return Document(self.parts + other.parts)

    @property
    def text(self) -> str:
        """The text of all parts, joined by single spaces."""
        return " ".join(p.strip() for p in self.parts if isinstance(p, str) and p.strip())

    @property
    def images(self) -> list[Image.Image]:
        return [p for p in self.parts if not isinstance(p, str)]

    def __repr__(self) -> str:
        shown = [p if isinstance(p, str) else f"<image {p.width}x{p.height}>" for p in self.parts]
        return f"Document({shown!r})"

    def to_html(self, scale: int = 1) -> str:
        """Returns the document as an HTML fragment that contains its images, each pixel `scale` wide."""
        return _template().module.fragment(self._shown(scale))

    def _repr_html_(self) -> str:
        return _template().module.paragraph(self._shown())

    def save_html(self, path: str | Path) -> None:
        """Writes one self-contained page."""
        write_text(path, _template().render(parts=self._shown()) + "\n")

    def _shown(self, scale: int | None = None) -> list[str | dict]:
        """Returns the parts as the template takes them; without `scale`, small images are enlarged."""
        smallest = min((min(p.size) for p in self.images), default=256)
        scale = max(1, 64 // smallest) if scale is None else scale
        return [p if isinstance(p, str) else _encoded(p, scale) for p in self.parts]


def image_html(image: Image.Image, scale: int = 1) -> str:
    """Returns an `<img>` element that contains the image (PNG, base64), each pixel `scale` wide."""
    return _template().module.image(_encoded(image, scale))


def _encoded(image: Image.Image, scale: int) -> dict:
    """Returns an image as the template takes it: its size on the page, and its data."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # PNG has no other modes
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    png = b64encode(buffer.getvalue()).decode()
    return {"width": image.width * scale, "height": image.height * scale, "png": png}


@functools.cache
def _template() -> Any:
    import jinja2  # slow to import, and only for pages

    loader = jinja2.PackageLoader("dreamllm_jax")
    return jinja2.Environment(loader=loader, autoescape=True).get_template("document.html.jinja")
