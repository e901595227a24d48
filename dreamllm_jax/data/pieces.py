"""A document as pieces: text, pictures, ends; and how pairs and articles become pieces (dialogs: `chat`).

What the model learns is decided here (`supervised`); what fits, in `sequences`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from dreamllm_jax.data.images import ImageLike

MODES = ("comprehension", "creation", "joint")


@dataclasses.dataclass(frozen=True)
class Text:
    """One chunk of plain text; a `shrinkable` one gives way to what follows it in a document.

    `continues`: the chunk goes on after a picture or `</s>` in the same string, as in a conversation.
    `glued`: it goes on in the chunk of the `Text` before it. The two are encoded as one string, and a token
    that covers characters of both is learned if one of them is.
    """

    text: str
    supervised: bool = True
    shrinkable: bool = False
    continues: bool = False
    glued: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture the model sees, dreams, or both; `supervised` is about its `<dream_start>`."""

    image: ImageLike
    seen: bool
    dreamed: bool
    supervised: bool = True

    def num_tokens(self, num_patches: int, num_queries: int) -> int:
        """Tokens it takes, markers included."""
        return _picture_tokens(self, num_patches, num_queries)


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A picture told in a word: the markers and slots of a `Picture`, but no image.

    The word stands in the query slots, where it is learned: at their beginning for `place` 0, at their end
    for 1, nowhere for None. `patches` are the words in the patch slots, in turn, over and over: patches of a
    picture may be of different opinions. Slots without a word hold `<im_patch>`. So a language model learns
    from text alone what its queries will have to say, and what its patches will tell it.
    """

    word: str
    seen: bool
    dreamed: bool
    place: float | None = 1.0
    patches: tuple[str, ...] = ()
    supervised: bool = True

    def num_tokens(self, num_patches: int, num_queries: int) -> int:
        """As many as of a `Picture`."""
        return _picture_tokens(self, num_patches, num_queries)


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """A picture beside the text, in no slot: for towers that are trained on captions."""

    image: ImageLike


@dataclasses.dataclass(frozen=True)
class End:
    """`</s>`: the end of an answer or of the document.

    With `token` False, as the last piece, the document goes without the `</s>` that is put after others.
    """

    supervised: bool = True
    token: bool = True


@dataclasses.dataclass(frozen=True)
class Begin:
    """`<s>` within a document: where some templates begin a question.

    With `token` False, as the first piece, the document goes without the `<s>` that is put before others.
    """

    supervised: bool = False
    token: bool = True


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token of the tokenizer's own, by name: `<|im_start|>` in a conversation."""

    name: str
    supervised: bool = False


def _picture_tokens(picture: Picture | Spelled, num_patches: int, num_queries: int) -> int:
    return (num_patches + 2) * picture.seen + (num_queries + 2) * picture.dreamed


Piece = Text | Picture | Spelled | Beside | End | Begin | Control


def part_to_piece(part: str | ImageLike | Piece) -> Piece:
    """A part of a prompt: text or a picture that is seen, neither of them learned."""
    if isinstance(part, Piece):
        return part
    if isinstance(part, str):
        return Text(part, supervised=False)
    return Picture(part, seen=True, dreamed=False, supervised=False)


def check_mode(mode: str) -> None:
    """Raises ValueError for a mode that does not exist."""
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}; known: {', '.join(MODES)}.")


def captioned(image: ImageLike, caption: str) -> list[Piece]:
    """A caption with its picture beside it: no slots, nothing learned by the language model."""
    return [Text(caption, supervised=False), Beside(image), End(supervised=False)]


def pair(image: ImageLike, caption: str, mode: str, rng: np.random.Generator | None = None) -> list[Piece]:
    """An image-text pair.

    comprehension: the image, then its caption, which is learned. creation: the caption, then the
    image to dream; no token is learned, and a long caption gives way to the image. joint: one of
    the two, by a fair coin from `rng`.

    Raises:
      ValueError: an unknown mode, or joint without `rng`.
    """
    check_mode(mode)
    if mode == "joint":
        if rng is None:
            raise ValueError("pair(mode='joint') draws one of the two directions and needs rng=.")
        mode = "comprehension" if rng.random() < 0.5 else "creation"
    if mode == "comprehension":
        return [Picture(image, seen=True, dreamed=False, supervised=False), Text(caption), End()]
    return [
        Text(caption, supervised=False, shrinkable=True),
        Picture(image, seen=False, dreamed=True, supervised=False),
        End(supervised=False),
    ]


def interleaved(parts: Iterable[str | ImageLike | Piece], mode: str) -> list[Piece]:
    """A document: strings (stripped; empty ones left out) and pictures in reading order, all learned.

    A piece among the parts stands as it is, whatever the mode.

    Raises:
      ValueError: an unknown mode.
    """
    check_mode(mode)
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, Piece):
            pieces.append(part)
        elif isinstance(part, str):
            if part.strip():
                pieces.append(Text(part.strip()))
        else:
            pieces.append(Picture(part, seen=mode != "creation", dreamed=mode != "comprehension"))
    return [*pieces, End()]
