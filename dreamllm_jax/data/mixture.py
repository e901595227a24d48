"""A mixture of finite sources over files, each read in a new order every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import SourceConfig
from dreamllm_jax.config.registry import resolve
from dreamllm_jax.data.files import find_files
from dreamllm_jax.data.formats.base import Format, FormatContext
from dreamllm_jax.data.pieces import Piece
from dreamllm_jax.data.tokenizer import Tokenizer

# Documents are shuffled within windows of this size, so that every row reads every source, even where the
# number of rows and the weights have common factors.
_WINDOW = 4096


def check_sources(sources: Sequence[SourceConfig], tokenizer: Tokenizer) -> None:
    """Checks that formats, options and files of the sources exist; reads no records.

    Raises:
      ValueError: an unknown format, options that it does not have or cannot use, or a missing file.
    """
    for source in sources:
        with _named(source):
            kind, options = _format(source)
            find_files(source.path, "path")
            kind.check(options, tokenizer)


def has_index(source: SourceConfig) -> bool:
    """Returns whether the source's format keeps an index (see `index_sources`)."""
    kind, options = _format(source)
    return kind.index_key(options) is not None


def index_sources(sources: Sequence[SourceConfig], folder: Path) -> list[Path]:
    """Brings the indexes of the sources in `folder` up to date; returns the index files.

    One process does this. Then all processes open the sources with that folder, without scanning the files.

    Raises:
      ValueError: files that are missing or of another format.
      OSError: the folder cannot be written.
    """
    files = []
    for source in sources:
        with _named(source):
            kind, options = _format(source)
            if (file := _index_file(source, kind, options, folder)) is not None:
                kind.update_index(find_files(source.path, "path"), options, file)
                files.append(file)
    return files


def open_format(
    source: SourceConfig, mode: str, tokenizer: Tokenizer, index_folder: Path | None = None
) -> Format:
    """Opens the files of one source; `index_folder` is that of `index_sources`, or None.

    Raises:
      ValueError: files that are missing, of another format or without records, or impossible options.
    """
    with _named(source):
        kind, options = _format(source)
        index = None if index_folder is None else _index_file(source, kind, options, index_folder)
        opened = kind(find_files(source.path, "path"), options, FormatContext(mode, tokenizer, index))
        if not len(opened):
            raise ValueError(f"path: {source.path!r} holds no record; give files that do.")
    return opened


def open_mixture(
    sources: Sequence[SourceConfig],
    mode: str,
    seed: int,
    tokenizer: Tokenizer,
    index_folder: Path | None = None,
) -> Mixture:
    """Opens every source; `index_folder` is that of `index_sources`, or None.

    Raises:
      ValueError: as `open_format`.
    """
    formats = [open_format(source, mode, tokenizer, index_folder) for source in sources]
    return Mixture(formats, [source.weight for source in sources], seed)


class Mixture:
    """Document `index` of an endless mixture: a function of (seed, index, and the sources' sizes).

    Each source has exactly its share by weight, and each of its records comes once an epoch.
    """

    def __init__(self, formats: Sequence[Format], weights: Sequence[float], seed: int):
        import grain  # slow to import, and only here

        self.formats = list(formats)
        orders = []
        for i, source in enumerate(self.formats):
            numbers = grain.MapDataset.range(len(source)).shuffle(seed=_seed(seed, i)).repeat()
            orders.append(numbers.map(lambda number, i=i: (i, number)))
        self._order: Any = orders[0]  # grain's types do not tell what an order yields
        if len(orders) > 1:
            mixed = grain.MapDataset.mix(orders, list(weights))
            seed = _seed(seed, len(orders))
            self._order = grain.experimental.WindowShuffleMapDataset(mixed, window_size=_WINDOW, seed=seed)

    def document(self, rng: np.random.Generator, index: int) -> list[Piece]:
        """Returns a document; raises BrokenRecord for a record that cannot be used."""
        i, number = self._order[index]
        return self.formats[i].document(int(number), rng)


def _seed(seed: int, i: int) -> int:
    return int(np.random.SeedSequence((seed, i)).generate_state(1)[0])


def _format(source: SourceConfig) -> tuple[type[Format], Any]:
    """Returns the source's format, and its options."""
    kind = resolve("format", source.format)
    if not (isinstance(kind, type) and issubclass(kind, Format)):
        raise ValueError(
            f"{source.format} is not a data format; name a subclass of dreamllm_jax.data.formats.base.Format."
        )
    return kind, build(kind.Options, source.options, "options")


def _index_file(source: SourceConfig, kind: type[Format], options: Any, folder: Path) -> Path | None:
    """Returns the index's file, or None. Sources that share paths and index key share an index."""
    key = kind.index_key(options)
    if key is None:
        return None
    name = hashlib.sha256(f"{source.path}\n{key}".encode()).hexdigest()[:16]
    return folder / f"{name}.{kind.__name__.lower()}"


@contextmanager
def _named(source: SourceConfig) -> Iterator[None]:
    """Prefixes errors raised in the block with the source they belong to."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.sources ({source.format}) {error}") from error
