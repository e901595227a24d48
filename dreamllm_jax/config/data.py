"""The data of one stage: where its documents come from, and the shape of its batches."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from dreamllm_jax.config.registry import check_name


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Files of documents in one format, and how often they are read relative to other sources.

    `format` is one of the package's, one that an installed package registers, or
    `package.module:Class` (see `config.registry`). The package's formats:

      pairs          webdataset tars of image and caption
      interleaved    MMC4's jsonl (or json lists), with the images of its documents
      conversations  LLaVA's json (or jsonl), with its images
      instructions   InstructMMC4's json (or jsonl): an instruction, answered by an interleaved document

    `path` may have globs and ranges (`{00000..00041}.tar`, `{a,b}`); a relative one counts from the current
    folder. `options` are the format's own, checked by the dataclass `Options` of its class.
    """

    format: str
    path: str
    weight: float = 1.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        check_name("format", self.format)
        if self.weight <= 0:
            raise ValueError(f"data.sources: {self.path!r} has weight {self.weight}; it must be positive.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The documents of a stage, and the shape of the batches they are packed into.

    Documents come either from files, a mixture of `sources`, or from the class that `source` names
    (`package.module:Class`, see `config.registry`) with its own `source_options`.

    A batch has `batch_size` rows of `length` tokens, over all hosts. `max_images` and `max_dreams` are the
    budgets of one row; condition dropout takes one of its dreams. A row has at most `max_documents` documents
    (None: `length / 64`, at least 16), because the memory of attention on GPUs grows with that number. `mode`
    says whether images are seen, dreamed or both. Up to `lookahead` documents wait for a row where they fit.
    A thread makes `prefetch` batches ahead (0: none, no thread).
    """

    source: str | None = None
    source_options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    sources: tuple[SourceConfig, ...] = ()
    mode: Literal["comprehension", "creation", "joint"] = "joint"
    batch_size: int = 16
    length: int = 256
    max_images: int = 8
    max_dreams: int = 8
    max_documents: int | None = None
    lookahead: int = 8
    prefetch: int = 2

    def __post_init__(self):
        if self.sources and self.source is not None:
            raise ValueError("data: source and sources are both set; give one of the two.")
        if self.source_options and self.source is None:
            raise ValueError("data: source_options are the options of source, which is not set; set it.")
        if self.source is not None:
            check_name("source", self.source)
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
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"data.max_documents is {self.max_documents}; it must be at least 1.")
