"""A document as pieces: text, pictures, ends; and how pairs, articles and dialogs become pieces.

What the model learns is decided here (`supervised`); what fits, in `sequences`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.templates import Template, get_template

MODES = ("comprehension", "creation", "joint")


@dataclasses.dataclass(frozen=True)
class Text:
    """One chunk of plain text; a `shrinkable` one gives way to what follows it in a document.

    `continues`: the chunk goes on after a picture or `</s>` in the same string, as in a conversation.
    `glued`: it goes on within a word or line, so no space is put before it.
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
    """`</s>`: the end of an answer or of the document."""

    supervised: bool = True


@dataclasses.dataclass(frozen=True)
class Begin:
    """`<s>` within a document: where some templates begin a question. Never learned."""


def _picture_tokens(picture: Picture | Spelled, num_patches: int, num_queries: int) -> int:
    return (num_patches + 2) * picture.seen + (num_queries + 2) * picture.dreamed


Piece = Text | Picture | Spelled | Beside | End | Begin


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


_MARKER = re.compile(r"(<image>|<dream>)")
Turn = str | Sequence[str | ImageLike | Piece]


def conversation(
    turns: Sequence[Turn], images: Iterable[ImageLike] = (), template: str | Template = "vicuna_v1.1"
) -> list[Piece]:
    """Turns of user and assistant, alternating; the answers and their `</s>` are learned.

    A turn is a string, where `<image>` stands for a picture to see and `<dream>` for one to dream
    and then see, taken from `images` in order; or a sequence of strings (plain text, no markers)
    and pictures. Encode the result with any `eos`: it ends in `</s>`.

    Raises:
      ValueError: an odd number of turns, an unknown template or one that writes no whole conversations,
        markers and images that differ in number.
    """
    if not turns or len(turns) % 2:
        raise ValueError(
            f"A conversation has {len(turns)} turns; give an even number, user and assistant by turns."
        )
    style = template if isinstance(template, Template) else get_template(template)
    if style.unfit is not None:
        raise ValueError(f"Template {style.name!r} cannot write conversations to learn from: {style.unfit}.")
    queue = iter(images)
    pieces: list[Piece] = []
    for i in range(0, len(turns), 2):
        before = (style.between if i else style.opening) + style.before_user
        asked = _trimmed(_expand(turns[i], queue, False), style)
        pieces += _join(before, asked, style.after_user, False, continues=i > 0)
        answer = list(_expand(turns[i + 1], queue, True))
        if isinstance(turns[i + 1], str) and answer and isinstance(answer[0], str):
            answer[0] = answer[0].lstrip()
        pieces += [*_join("", answer, style.after_answer, supervised=True, glued=style.glued), End()]
    left = sum(1 for _ in queue)
    if left:
        raise ValueError(f"The conversation has {left} more images than <image> and <dream> markers.")
    return pieces


def question(parts: Sequence[str | ImageLike], style: Template) -> list[Piece]:
    """The beginning of a conversation up to where the assistant answers, strings as plain text."""
    end = style.after_user if style.cue is None else style.cue
    return _join(style.opening + style.before_user, _trimmed(parts, style), end, supervised=False)


def _trimmed(parts: Iterable[str | Piece | ImageLike], style: Template) -> list[str | Piece | ImageLike]:
    """What a user says, as the template wants it."""
    said = list(parts)
    if style.trims and said:
        said[0] = said[0].lstrip() if isinstance(said[0], str) else said[0]
        said[-1] = said[-1].rstrip() if isinstance(said[-1], str) else said[-1]
    return said


def _expand(turn: Turn, queue: Iterator[ImageLike], supervised: bool) -> Iterator[str | Piece | ImageLike]:
    if not isinstance(turn, str):
        yield from turn
        return
    for part in _MARKER.split(turn):
        if part not in ("<image>", "<dream>"):
            yield part
            continue
        image = next(queue, None)
        if image is None:
            raise ValueError("The conversation has more <image> and <dream> markers than images.")
        yield Picture(image, seen=True, dreamed=part == "<dream>", supervised=supervised)


def _join(
    before: str,
    parts: Iterable[str | Piece | ImageLike],
    after: str,
    supervised: bool,
    continues: bool = False,
    glued: bool = False,
) -> list[Piece]:
    """Pieces of one turn; text between two pictures is one chunk, as the reference tokenizes it."""
    pieces: list[Piece] = []
    text = ""
    for part in (*_written(before), *parts, *_written(after)):
        if isinstance(part, str):
            text += part
            continue
        if text:
            pieces.append(Text(text, supervised, continues=continues, glued=glued))
        text, continues, glued = "", True, False
        pieces.append(part_to_piece(part))
    if text:
        pieces.append(Text(text, supervised, continues=continues, glued=glued))
    return pieces


def _written(text: str) -> list[str | Piece]:
    """A template's text: `<s>` and `</s>` in it are the control tokens."""
    control: dict[str, Piece] = {"<s>": Begin(), "</s>": End(supervised=False)}
    return [control[part] if part in control else part for part in re.split("(</?s>)", text)]
