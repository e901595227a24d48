"""The data of one stage: a source, the kinds of documents drawn from it, and the shape of its batches."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class KindWeights:
    """How often each kind of document is drawn, relative to the others.

    captions: a picture beside its caption, in no slot (for towers that are trained on captions);
    pairs, conversations, documents: what DreamLLM trains on; text: documents without pictures.
    """

    captions: float = 0.0
    pairs: float = 0.0
    conversations: float = 0.0
    documents: float = 0.0
    text: float = 0.0

    def __post_init__(self):
        for name, weight in dataclasses.asdict(self).items():
            if weight < 0:
                raise ValueError(f"data.kinds.{name} is {weight}; a weight cannot be negative.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows of the global batch, their length in tokens, and what stands in them.

    `max_images` and `max_dreams` are the budgets of one row (of which condition dropout takes one
    dream). `mode` says whether pictures are seen, dreamed or both. `caption_dropout` is the share of
    captions left empty. `lookahead` documents may wait for a row where they fit. `prefetch` batches
    are made ahead by a thread (0: none, no thread).
    """

    source: Literal["handwriting"] | None = None
    kinds: KindWeights = dataclasses.field(default_factory=KindWeights)
    mode: Literal["comprehension", "creation", "joint"] = "joint"
    rows: int = 16
    length: int = 256
    max_images: int = 8
    max_dreams: int = 8
    augment: bool = True
    caption_dropout: float = 0.0
    lookahead: int = 8
    prefetch: int = 2

    def __post_init__(self):
        for name, least in (
            ("rows", 1),
            ("length", 2),
            ("max_images", 0),
            ("max_dreams", 0),
            ("lookahead", 1),
            ("prefetch", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"data.caption_dropout is {self.caption_dropout}; it must lie in [0, 1].")
