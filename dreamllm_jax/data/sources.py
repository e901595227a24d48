"""Where a stage's documents come from: a class that a recipe names, or a mixture of files.

A source of your own is a class that a recipe names as `package.module:Class`:

    import dataclasses

    import numpy as np

    from dreamllm_jax.data.pieces import pair

    @dataclasses.dataclass(frozen=True)
    class NoiseOptions:
        caption: str = "noise"

    class Noise:
        Options = NoiseOptions

        def __init__(self, options, context):
            self.options, self.size = options, context.picture_size

        def document(self, rng, index):
            image = rng.integers(0, 256, (self.size, self.size, 3), np.uint8)
            return pair(image, self.options.caption, "comprehension")

    data=dict(source="my_project.noise:Noise", source_options=dict(caption="grey noise"), ...)

`examples/handwriting/source.py` is a complete one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.registry import resolve
from dreamllm_jax.data.mixture import check_sources, open_mixture
from dreamllm_jax.data.pieces import Piece, check_mode
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """What a stage tells its source.

    `mode` says whether images are seen, dreamed or both. `picture_size` is the size in pixels of the
    largest images that the model takes: an array [picture_size, picture_size, 3] of uint8 is used as it is.
    """

    mode: str
    picture_size: int
    tokenizer: Tokenizer
    seed: int = 0

    def __post_init__(self):
        check_mode(self.mode)


@runtime_checkable
class DocumentSource(Protocol):
    """Endless documents, each a function of its own generator and index."""

    def document(self, rng: np.random.Generator, index: int) -> list[Piece]:
        """Returns one document; `rng` is valid during the call alone.

        `index` counts the documents of all rows: of `batch_size` rows, row r has r, r + batch_size, ... A
        finite source may take record `index % size` of a shuffled epoch, an endless one samples from `rng`.

        Raises:
          BrokenRecord: the record cannot be used; it is counted, and the row reads on.
        """
        ...


def open_documents(
    config: DataConfig,
    picture_size: int,
    tokenizer: Tokenizer,
    seed: int = 0,
    index_folder: Path | None = None,
) -> DocumentSource:
    """Returns the source that a stage's config names; `seed` orders the epochs of files.

    `index_folder` is that of `mixture.index_sources`: files with an index are not scanned.

    Raises:
      ValueError: no source is named, or its options, files or class cannot be used.
    """
    if config.sources:
        return open_mixture(config.sources, config.mode, seed, tokenizer, index_folder)
    make, options = _source(config)
    return make(options, SourceContext(config.mode, picture_size, tokenizer, seed))


def check_source(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Checks a stage's source without reading data: names, options, and whether files exist.

    Raises:
      ValueError: as `open_documents`, as far as it can be told.
    """
    if config.sources:
        check_sources(config.sources, tokenizer)
    else:
        _source(config)


def _source(config: DataConfig) -> tuple[Any, Any]:
    """Returns the source's class, and its options."""
    if config.source is None:
        raise ValueError(
            "data.source is not set; set it to a class (package.module:Class), or list files in data.sources."
        )
    make = resolve("source", config.source)
    if not (callable(make) and dataclasses.is_dataclass(getattr(make, "Options", None))):
        raise ValueError(
            f"data.source {config.source!r} is not a document source; name a class with a dataclass Options, "
            "made as Class(options, context): see dreamllm_jax/data/sources.py."
        )
    return make, build(make.Options, config.source_options, "data.source_options")
