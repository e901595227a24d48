"""The letters of every axis, the static batch, and the document.

One alphabet serves every signature, einsum and comment of the project:

    B rows            L length           D LLM width       V vocabulary
    N query heads     K key/value heads  H head width      F MLP width
    I images per row  J dreams per row   P patches/image   Q dream queries
    X condition width T diffusion steps  S cache length    E vision width
    h w c             pixels and latents, always channels-last
"""

from __future__ import annotations

import dataclasses
import html
import io
import typing
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path

import flax.struct
from jaxtyping import Array, Bool, Float, Int, Num
from PIL import Image


@typing.no_type_check  # shapes and shardings travel in the same container
@flax.struct.dataclass
class Batch:
    """Rows of fixed length with fixed image budgets; every array shards on its first axis.

    Several documents share a row: `segment_ids` counts them from 1 (0 is padding), `positions`
    restart at 0 in each, attention never crosses them. Images enter by a gather within the row:
    `image_slots` is -1, or `k * P + p` for patch p of the row's k-th image; `dream_slots` is -1,
    or `k * Q + q` for query q of the row's k-th dream. `targets[b, l]` is the token that follows
    position l, counted with `loss_weights[b, l]`.

    `null_dream` names, per row, the dream of the empty prompt (`<s><dream_start> Q <dream_end>`),
    whose state replaces a dropped condition; -1 where the row has none.

    `dream_sizes` are SDXL's size conditions of each dream: original height and width, crop top and
    left, target height and width, in pixels. A field without use in a model may be None.

    Pictures are bytes; floats are taken as pixels normalized for their tower.
    """

    tokens: Int[Array, "B L"]
    targets: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    loss_weights: Float[Array, "B L"]
    image_slots: Int[Array, "B L"]
    dream_slots: Int[Array, "B L"]
    image_mask: Bool[Array, "B I"]
    dream_mask: Bool[Array, "B J"]
    null_dream: Int[Array, "B"]
    images: Num[Array, "B I h w 3"] | None = None
    dream_images: Num[Array, "B J h2 w2 3"] | None = None
    dream_sizes: Int[Array, "B J 6"] | None = None


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
