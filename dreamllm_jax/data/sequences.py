"""Documents to tokens: which token is at which position, and which of them the model learns to write.

With P patches per image and Q dream queries, an image becomes

    seen              <im_start> P*<im_patch> <im_end>
    dreamed           <dream_start> Q*<im_patch> <dream_end>
    dreamed and seen  the first, then the second

Query slots have the id of `<im_patch>`; the learned queries replace their embeddings. A `TokenPicture` has
the same layout, with tokens in the slots and no image. Text and `</s>` are learned. Of an image's markers
only `<dream_start>` is: the model decides when to draw.

Example: "one", an image that is dreamed and seen, and "two", with P = Q = 2 (`.` is -1, or not learned):

    tokens       <s> one <dream_start> patch patch <dream_end> <im_start> patch patch <im_end> two </s>
    supervised    .   x        x         .     .        .          .        .     .      .      x   x
    dream_slots   .   .        .         0     1        .          .        .     .      .      .   .
    image_slots   .   .        .         .     .        .          .        0     1      .      .   .

`packing` puts several such documents into a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from dreamllm_jax.data.chat import question, template_of
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import (
    Begin,
    ControlToken,
    End,
    Picture,
    Piece,
    Text,
    TokenPicture,
    UnslottedImage,
    part_to_piece,
)
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.document import Document


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDocument:
    """One document in tokens.

    `supervised[l]` says that token l is a training target. Slots are those of `batch.Batch`, with images and
    dreams counted within the document. `dropped_images` and `dropped_tokens` (of text) did not fit.
    `broken_images` could not be read. `broken_documents` is 1 if this document could not be read at all.
    """

    tokens: Int[np.ndarray, "L"]
    supervised: Bool[np.ndarray, "L"]
    image_slots: Int[np.ndarray, "L"]
    dream_slots: Int[np.ndarray, "L"]
    images: tuple[ImageLike, ...] = ()
    dreams: tuple[ImageLike, ...] = ()
    dropped_images: int = 0
    dropped_tokens: int = 0
    broken_images: int = 0
    broken_documents: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def has_targets(self) -> bool:
        """Whether anything is learned from it: a token, a dream, or an image without slots."""
        unslotted = bool(self.images) and (self.image_slots < 0).all()
        return bool(self.dreams or unslotted or self.supervised.any())

    @property
    def dropped(self) -> int:
        """The number of images and text tokens that did not fit."""
        return self.dropped_images + self.dropped_tokens


class _Writer:
    """Appends pieces to four lists of the same length, and collects images and dreams."""

    def __init__(self, tokenizer: Tokenizer, num_patches: int, num_queries: int):
        self.tokenizer, self.ids = tokenizer, tokenizer.special
        self.num_patches, self.num_queries = num_patches, num_queries
        self.tokens: list[int] = []
        self.supervised: list[bool] = []
        self.image_slots: list[int] = []
        self.dream_slots: list[int] = []
        self.images: list[ImageLike] = []
        self.dreams: list[ImageLike] = []

    def write(self, tokens: Sequence[int], supervised: bool | Sequence[bool]) -> None:
        n = len(tokens)
        self.tokens += tokens
        self.supervised += [supervised] * n if isinstance(supervised, bool) else supervised
        self.image_slots += [-1] * n
        self.dream_slots += [-1] * n

    def is_full(self, piece: Piece, max_images: int | None, max_dreams: int | None) -> bool:
        """Returns whether no budget has room for the piece (an `UnslottedImage` needs room in one)."""
        no_image = max_images is not None and len(self.images) >= max_images
        no_dream = max_dreams is not None and len(self.dreams) >= max_dreams
        if isinstance(piece, UnslottedImage):
            return no_image and no_dream
        return isinstance(piece, Picture) and (piece.seen and no_image or piece.dreamed and no_dream)

    def piece(self, piece: Piece, max_images: int | None = None, max_dreams: int | None = None) -> None:
        """Writes any piece but text."""
        if isinstance(piece, Picture):
            self.picture(piece)
        elif isinstance(piece, TokenPicture):
            self.token_picture(piece)
        elif isinstance(piece, End):
            self.write([self.ids.eos] * piece.token, piece.supervised)
        elif isinstance(piece, Begin):
            self.write([self.ids.bos] * piece.token, piece.supervised)
        elif isinstance(piece, ControlToken):
            self.write([self.tokenizer.token_id(piece.name)], piece.supervised)
        elif isinstance(piece, UnslottedImage):
            if max_images is None or len(self.images) < max_images:
                self.images.append(piece.image)
            if max_dreams is None or len(self.dreams) < max_dreams:
                self.dreams.append(piece.image)

    def picture(self, picture: Picture) -> None:
        ids = self.ids
        if picture.dreamed:
            self.write([ids.dream_start], picture.supervised)
            first = len(self.dreams) * self.num_queries
            self.write([ids.im_patch] * self.num_queries, False)
            if self.num_queries:
                self.dream_slots[-self.num_queries :] = range(first, first + self.num_queries)
            self.write([ids.dream_end], False)
            self.dreams.append(picture.image)
        if picture.seen:
            self.write([ids.im_start], False)
            first = len(self.images) * self.num_patches
            self.write([ids.im_patch] * self.num_patches, False)
            if self.num_patches:
                self.image_slots[-self.num_patches :] = range(first, first + self.num_patches)
            self.write([ids.im_end], False)
            self.images.append(picture.image)

    def token_picture(self, picture: TokenPicture) -> None:
        ids = self.ids
        if picture.dreamed:
            tokens, learned = picture.query_tokens(self.tokenizer, self.num_queries)
            assert len(tokens) == len(learned) == self.num_queries, (picture, tokens, learned)
            self.write([ids.dream_start], picture.supervised)
            self.write(tokens, learned)
            self.write([ids.dream_end], False)
        if picture.seen:
            patches = picture.patch_tokens(self.tokenizer, self.num_patches)
            assert len(patches) == self.num_patches, (picture, patches)
            self.write([ids.im_start, *patches, ids.im_end], False)

    def sequence(self, dropped_images: int = 0, dropped_tokens: int = 0) -> EncodedDocument:
        return EncodedDocument(
            np.array(self.tokens, np.int32),
            np.array(self.supervised, bool),
            np.array(self.image_slots, np.int32),
            np.array(self.dream_slots, np.int32),
            tuple(self.images),
            tuple(self.dreams),
            dropped_images,
            dropped_tokens,
        )


def encode_pieces(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    num_patches: int,
    num_queries: int,
    max_length: int,
    eos: bool = True,
    max_images: int | None = None,
    max_dreams: int | None = None,
) -> EncodedDocument:
    """Encodes `<s>`, the pieces, and with `eos` (unless the pieces end with `End`) `</s>`.

    A document ends where something does not fit. Text is cut after the last token that fits. An image that
    does not fit `max_length`, `max_images` or `max_dreams` is left out entirely. Whatever follows is left
    out, too. A document cut short has a `</s>`, but it is not learned, since the document did not end there.
    Otherwise the closing `</s>` is learned if the last piece is. A `Begin` at the start and an `End` at the
    end state whether their token is written.

    Raises:
      ValueError: `max_length` has no room for a single token beside `</s>`.
    """
    pieces = list(pieces)
    if eos and not (pieces and isinstance(pieces[-1], End)):
        pieces.append(End(_is_learned(pieces[-1]) if pieces else True))
    closing = bool(pieces) and isinstance(pieces[-1], End) and pieces[-1].token
    limit = max_length - closing
    if limit < 1:
        raise ValueError(f"max_length={max_length} leaves no room for a document; give at least 2 tokens.")
    writer = _Writer(tokenizer, num_patches, num_queries)
    _begin(writer, pieces)
    body = _chunks(pieces[: len(pieces) - closing])
    shrunk = 0
    for i, chunk in enumerate(body):
        room, piece = limit - len(writer.tokens), chunk[0]
        if isinstance(piece, Text):
            tokens, supervised = _encode(chunk, tokenizer)
            if piece.shrinkable:
                room = max(0, room - sum(_num_tokens(p, writer) for rest in body[i + 1 :] for p in rest))
            writer.write(tokens[:room], supervised[:room])
            dropped = max(0, len(tokens) - room)
            if dropped and not piece.shrinkable:
                return _cut(writer, body[i + 1 :], closing, shrunk + dropped, tokenizer)
            shrunk += dropped
        elif _num_tokens(piece, writer) > room or writer.is_full(piece, max_images, max_dreams):
            return _cut(writer, body[i:], closing, shrunk, tokenizer)
        else:
            writer.piece(piece, max_images, max_dreams)
    if closing:
        writer.write([writer.ids.eos], _is_learned(pieces[-1]))
    return writer.sequence(dropped_tokens=shrunk)


def _begin(writer: _Writer, pieces: Sequence[Piece]) -> None:
    """Writes `<s>`, unless the pieces begin with a piece of their own for it."""
    if not (pieces and isinstance(pieces[0], Begin)):
        writer.write([writer.ids.bos], False)


def _chunks(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Returns the pieces in groups of one; glued text joins the group of the text before it."""
    chunks: list[list[Piece]] = []
    for piece in pieces:
        if isinstance(piece, Text) and piece.glued and chunks and isinstance(chunks[-1][-1], Text):
            chunks[-1].append(piece)
        else:
            chunks.append([piece])
    return chunks


def _encode(chunk: list[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Returns the ids of text that is encoded as one string, and which of them are learned.

    "ASSISTANT:" and the learned " seven" give the tokens "ASSISTANT", ":", " seven"; the last is learned. A
    token that spans a boundary is learned too: "ASSISTANT: " and the learned "seven" give the same result.
    """
    texts = [piece for piece in chunk if isinstance(piece, Text)]
    whole, continues = "".join(text.text for text in texts), texts[0].continues
    if len(texts) == 1:
        tokens = tokenizer.encode(whole, continues)
        return tokens, [texts[0].supervised] * len(tokens)
    tokens, spans = tokenizer.encode_with_offsets(whole, continues)
    learned = [text.supervised for text in texts for _ in text.text]
    return tokens, [any(learned[start : max(end, start + 1)]) for start, end in spans]


def _is_learned(piece: Piece) -> bool:
    return not isinstance(piece, UnslottedImage) and piece.supervised


def _num_tokens(piece: Piece, writer: _Writer) -> int:
    """Returns the number of tokens of any piece but text."""
    if isinstance(piece, Picture | TokenPicture):
        return piece.num_tokens(writer.num_patches, writer.num_queries)
    return int(isinstance(piece, ControlToken) or (isinstance(piece, End | Begin) and piece.token))


def _cut(
    writer: _Writer, rest: list[list[Piece]], closing: bool, dropped_tokens: int, tokenizer: Tokenizer
) -> EncodedDocument:
    """Ends a document early, and counts what is left out."""
    if closing:
        writer.write([writer.ids.eos], False)
    return writer.sequence(
        sum(isinstance(chunk[0], Picture | TokenPicture | UnslottedImage) for chunk in rest),
        dropped_tokens + sum(len(_encode(c, tokenizer)[0]) for c in rest if isinstance(c[0], Text)),
    )


def encode_prompt(
    prompt: str | Document,
    tokenizer: Tokenizer,
    num_patches: int,
    max_length: int,
    max_images: int | None = None,
    template: str | None = None,
) -> EncodedDocument:
    """Encodes a prompt to continue: `<s>`, then text and images in order, without `</s>`.

    Images are seen, not dreamed. With a conversation `template` the prompt is the user's turn, and begins
    as the template says. Strings are always plain text.

    Raises:
      ValueError: there are more tokens than `max_length` or more images than `max_images`, or the template
        cannot be used.
    """
    parts = [prompt] if isinstance(prompt, str) else list(prompt)
    if template:
        pieces = question(parts, template_of(template, tokenizer))
    else:
        pieces = [part_to_piece(part) for part in parts]
    writer = _Writer(tokenizer, num_patches, 0)
    _begin(writer, pieces)
    for chunk in _chunks(pieces):
        if isinstance(chunk[0], Text):
            writer.write(*_encode(chunk, tokenizer))
        else:
            writer.piece(chunk[0])
    if max_images is not None and len(writer.images) > max_images:
        raise ValueError(
            f"The prompt has {len(writer.images)} images; at most {max_images} fit. Use fewer images."
        )
    if len(writer.tokens) > max_length:
        raise ValueError(
            f"The prompt has {len(writer.tokens)} tokens ({num_patches + 2} of them for each of its "
            f"{len(writer.images)} images); at most {max_length} fit. Shorten it."
        )
    return writer.sequence()
