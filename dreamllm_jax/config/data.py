"""The data of one stage: where its documents come from, and the shape of its batches."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class KindWeights:
    """How often each kind of document is drawn, relative to the others.

    captions: a picture beside its caption, in no slot (for towers that are trained on captions);
    pairs, conversations, documents: what DreamLLM trains on; text: words alone, some of them told as
    pictures are (`pieces.Spelled`).
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
class SourceConfig:
    """Files of documents, and how often they are drawn relative to the other sources of a mixture.

    `kind` says what the files of `path` are:
      pairs          webdataset tars of image and caption: `txt`, or the key `caption_key` of `json`
      interleaved    MMC4's jsonl (or json lists), pictures in `images`; of these, the ones whose
                     `matched_sim` is below `min_similarity` are left out
      conversations  LLaVA's json (or jsonl), pictures in `images`, written in `template`
      instructions   InstructMMC4's json (or jsonl): an instruction, answered by such a document

    `path` and `images` may have globs and ranges (`{00000..00041}.tar`, `{a,b}`); relative ones count
    from the current folder. `images` is a folder, or zips or tars of pictures.
    """

    kind: Literal["pairs", "interleaved", "conversations", "instructions"]
    path: str
    images: str | None = None
    weight: float = 1.0
    caption_key: str | None = None
    min_similarity: float | None = None
    template: str = "vicuna_v1.1"

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"data.sources: {self.path!r} has weight {self.weight}; it must be positive.")
        mmc4 = self.kind in ("interleaved", "instructions")
        if mmc4 and self.images is None:
            raise ValueError(
                f"data.sources: {self.path!r} ({self.kind}) needs images: where its pictures are."
            )
        if self.kind == "pairs" and self.images is not None:
            raise ValueError(
                f"data.sources: {self.path!r} (pairs) has its pictures inside; leave images out."
            )
        if self.kind != "pairs" and self.caption_key is not None:
            raise ValueError(
                f"data.sources: {self.path!r} ({self.kind}) has no captions; caption_key is for pairs."
            )
        if not mmc4 and self.min_similarity is not None:
            raise ValueError(
                f"data.sources: {self.path!r} ({self.kind}) has no similarities; min_similarity is for "
                "interleaved and instructions."
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Rows of the global batch, their length in tokens, and what stands in them.

    Documents come from the built-in `source`, in `kinds`, or from files: a mixture of `sources`.
    `max_images` and `max_dreams` are the budgets of one row (of which condition dropout takes one
    dream). `mode` says whether pictures are seen, dreamed or both. `caption_dropout` is the share of
    captions left empty. `lookahead` documents may wait for a row where they fit. `prefetch` batches
    are made ahead by a thread (0: none, no thread). `augment` and `caption_dropout` are the built-in
    source's.
    """

    source: Literal["handwriting"] | None = None
    kinds: KindWeights = dataclasses.field(default_factory=KindWeights)
    sources: tuple[SourceConfig, ...] = ()
    mode: Literal["comprehension", "creation", "joint"] = "joint"
    batch_size: int = 16
    length: int = 256
    max_images: int = 8
    max_dreams: int = 8
    augment: bool = True
    caption_dropout: float = 0.0
    lookahead: int = 8
    prefetch: int = 2

    def __post_init__(self):
        if self.sources and (self.source is not None or self.kinds != KindWeights()):
            raise ValueError(
                "data: sources are files, source and kinds are the built-in corpus; give one of the two."
            )
        for name, least in (
            ("batch_size", 1),
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
