"""Defines the pieces of documents, and makes them from pairs and articles (`chat`: from dialogs).

Pieces say what the model learns (`supervised`). `sequences` decides what fits.

Example: `pair(image, "a seven", "comprehension")` is

    [Picture(image, seen=True, dreamed=False, supervised=False), Text("a seven"), End()]
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable

import numpy as np

from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.tokenizer import Tokenizer

MODES = ("comprehension", "creation", "joint")


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text.

    A `shrinkable` text is cut to make room for what follows it in the document. Text that `continues` follows
    an image or `</s>` within one string, as in a conversation. Text that is `glued` is encoded together with
    the `Text` before it, as one string; a token that covers characters of both is learned if either is.
    """

    text: str
    supervised: bool = True
    shrinkable: bool = False
    continues: bool = False
    glued: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An image that the model sees, dreams, or both; `supervised`: learn its `<dream_start>`."""

    image: ImageLike
    seen: bool
    dreamed: bool
    supervised: bool = True

    def num_tokens(self, num_patches: int, num_queries: int) -> int:
        """Returns the number of tokens it takes, markers included."""
        return _picture_tokens(self, num_patches, num_queries)


class TokenPicture(abc.ABC):
    """An image written in tokens: laid out as a `Picture`, with tokens in the slots and no image.

    A subclass says which tokens. The model learns the layout of images from it, and whatever the tokens
    say, without a vision tower or an image decoder: `examples/handwriting` writes an image's content in
    words, so that the language model learns what its dream queries will have to express.
    """

    seen: bool
    dreamed: bool
    supervised: bool

    @abc.abstractmethod
    def query_tokens(self, tokenizer: Tokenizer, num_queries: int) -> tuple[list[int], list[bool]]:
        """Returns the `num_queries` tokens of the query slots, and which of them are learned."""

    @abc.abstractmethod
    def patch_tokens(self, tokenizer: Tokenizer, num_patches: int) -> list[int]:
        """Returns the `num_patches` tokens of the patch slots, none of which is learned."""

    def num_tokens(self, num_patches: int, num_queries: int) -> int:
        """Returns the number of tokens, which is that of a `Picture`."""
        return _picture_tokens(self, num_patches, num_queries)


@dataclasses.dataclass(frozen=True, eq=False)
class UnslottedImage:
    """An image that takes no slots: the towers get it, the language model does not.

    The objectives that pretrain towers ("vae", "contrastive", "diffusion") learn from such an image and its
    caption; DreamLLM's own objective needs none.
    """

    image: ImageLike


@dataclasses.dataclass(frozen=True)
class End:
    """`</s>`: the end of an answer or of the document.

    As the last piece, with `token` False, it ends the document without `</s>`.
    """

    supervised: bool = True
    token: bool = True


@dataclasses.dataclass(frozen=True)
class Begin:
    """`<s>` within a document: some templates begin a question with it.

    As the first piece, with `token` False, it begins the document without `<s>`.
    """

    supervised: bool = False
    token: bool = True


@dataclasses.dataclass(frozen=True)
class ControlToken:
    """A control token of the tokenizer's own, by name: `<|im_start|>` in a conversation."""

    name: str
    supervised: bool = False


def _picture_tokens(picture: Picture | TokenPicture, num_patches: int, num_queries: int) -> int:
    return (num_patches + 2) * picture.seen + (num_queries + 2) * picture.dreamed


Piece = Text | Picture | TokenPicture | UnslottedImage | End | Begin | ControlToken


def part_to_piece(part: str | ImageLike | Piece) -> Piece:
    """Returns a part of a prompt as a piece: text, or an image that is seen; neither is learned."""
    if isinstance(part, Piece):
        return part
    if isinstance(part, str):
        return Text(part, supervised=False)
    return Picture(part, seen=True, dreamed=False, supervised=False)


def check_mode(mode: str) -> None:
    """Raises ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}; known: {', '.join(MODES)}.")


def captioned(image: ImageLike, caption: str) -> list[Piece]:
    """Returns a caption and its image, which takes no slots; the language model learns nothing from them."""
    return [Text(caption, supervised=False), UnslottedImage(image), End(supervised=False)]


def pair(image: ImageLike, caption: str, mode: str, rng: np.random.Generator | None = None) -> list[Piece]:
    """Returns an image-text pair as pieces.

    comprehension: the image, then its caption, which is learned. creation: the caption, then the image to
    dream; no token is learned, and a long caption is cut to make room for the image. joint: one of the two
    at random, by a fair coin from `rng`.

    Raises:
      ValueError: an unknown mode, or joint without `rng`.
    """
    check_mode(mode)
    if mode == "joint":
        if rng is None:
            raise ValueError("pair(mode='joint') chooses one of the two directions at random and needs rng=.")
        mode = "comprehension" if rng.random() < 0.5 else "creation"
    if mode == "comprehension":
        return [Picture(image, seen=True, dreamed=False, supervised=False), Text(caption), End()]
    return [
        Text(caption, supervised=False, shrinkable=True),
        Picture(image, seen=False, dreamed=True, supervised=False),
        End(supervised=False),
    ]


def interleaved(parts: Iterable[str | ImageLike | Piece], mode: str) -> list[Piece]:
    """Returns an interleaved document as pieces: strings and images in reading order, all of it learned.

    Strings are stripped, and empty ones left out. A piece among the parts is taken as it is in any mode.

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
