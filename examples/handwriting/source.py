"""The documents that the demonstration trains on: real handwritten digits, in words and pictures.

The kinds of data that DreamLLM trains on, and two more:

    pairs          IMAGE <-> a handwritten seven
    conversations  IMAGE Which digit is this? -> seven
    documents      Count from three to five. three IMAGE four IMAGE five IMAGE
                   Write two plus five. IMAGE plus IMAGE equals IMAGE
                   IMAGE What comes next? eight IMAGE        (never asked of a nine)
    captions       a caption and its image, which takes no slots: for the towers
    text           words alone (see `words`)

Words, counts and sums are those of `words`, which also says which of them are held out; a fifth of the
pictures is held out too (see `digits`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8

from dreamllm_jax.data.chat import conversation
from dreamllm_jax.data.pieces import Picture, Piece, captioned, interleaved, pair
from dreamllm_jax.data.sources import SourceContext
from examples.handwriting.digits import load_digits
from examples.handwriting.words import NEXT, QUESTION, WORDS, caption, story, text_document


@dataclasses.dataclass(frozen=True)
class KindWeights:
    """How often each kind of document comes, relative to the others; see the module's docstring."""

    captions: float = 0.0
    pairs: float = 0.0
    conversations: float = 0.0
    documents: float = 0.0
    text: float = 0.0

    def __post_init__(self):
        weights = dataclasses.asdict(self)
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} is {weight}; a weight cannot be negative.")
        if not any(weights.values()):
            raise ValueError(f"no kind has a weight; give one to some of {', '.join(weights)}.")


@dataclasses.dataclass(frozen=True)
class HandwritingOptions:
    """Which documents, and of which pictures.

    With `augment` a picture is shifted, rotated and scaled a little. `caption_dropout` is the share of
    captions that are left empty.
    """

    kinds: KindWeights
    augment: bool = True
    caption_dropout: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout is {self.caption_dropout}; it must lie in [0, 1].")


class Handwriting:
    """Endless documents over the training digits (a `data.sources.DocumentSource`)."""

    Options = HandwritingOptions

    def __init__(self, options: HandwritingOptions, context: SourceContext):
        weights = dataclasses.asdict(options.kinds)
        total = sum(weights.values())
        self.names = tuple(weights)
        self.thresholds = np.cumsum([w / total for w in weights.values()])
        self.mode, self.digits = context.mode, load_digits(context.picture_size)[0]
        self.augment, self.caption_dropout = options.augment, options.caption_dropout

    def document(self, rng: np.random.Generator, index: int) -> list[Piece]:
        """Returns a document made from `rng` alone; an endless source has no use for `index`."""
        chosen = int(np.searchsorted(self.thresholds, rng.random(), side="right"))
        return getattr(self, self.names[min(chosen, len(self.names) - 1)])(rng)

    def captions(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        text = "" if rng.random() < self.caption_dropout else caption(digit)
        return captioned(self._picture(digit, rng), text)

    def pairs(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        return pair(self._picture(digit, rng), caption(digit), self.mode, rng)

    def conversations(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        return conversation([(self._picture(digit, rng), QUESTION), WORDS[digit]], template="plain")

    def documents(self, rng: np.random.Generator) -> list[Piece]:
        # A prompt's picture has to be seen, so in creation no document begins with one.
        first, parts = story(rng, given=self.mode != "creation")
        pictured = [p if isinstance(p, str) else self._picture(p, rng) for p in parts]
        if isinstance(first, str):
            return interleaved([first, *pictured], self.mode)
        # The picture that a document begins with is a prompt: seen, never dreamed.
        given = Picture(self._picture(first, rng), seen=True, dreamed=False)
        return interleaved([given, NEXT, *pictured], self.mode)

    def text(self, rng: np.random.Generator) -> list[Piece]:
        return text_document(rng, self.mode)

    def _picture(self, digit: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        return self.digits.picture(digit, rng, self.augment)
