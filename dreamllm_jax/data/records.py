"""A mixture of finite sources over files, each gone through in a new order every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from dreamllm_jax.config.data import DataConfig, SourceConfig
from dreamllm_jax.data.archives import open_images
from dreamllm_jax.data.chat import ChatTemplate, conversation, template_of
from dreamllm_jax.data.files import JsonRecords, find_files
from dreamllm_jax.data.formats.llava import Conversations
from dreamllm_jax.data.formats.mmc4 import Documents, Instructions
from dreamllm_jax.data.formats.tar_index import update_index
from dreamllm_jax.data.formats.webdataset import Pairs, caption_suffix
from dreamllm_jax.data.pieces import Piece
from dreamllm_jax.data.tokenizer import Tokenizer

# Sources change places within so many documents; a row then reads all of them, whatever the number of rows.
_WINDOW = 4096


@runtime_checkable
class Records(Protocol):
    """Documents by number."""

    def __len__(self) -> int: ...

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Document `number`; BrokenRecord where it cannot be used."""
        ...


def check_sources(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Looks whether every file that the sources name is there, reading none; and at their templates.

    Raises:
      ValueError: one is not, or a template does not exist or cannot be learned from.
    """
    for source in config.sources:
        find_files(source.path, _where(source, "path"))
        if source.images is not None:
            find_files(source.images, _where(source, "images"))
        _template(source, tokenizer)


def index_sources(sources: Sequence[SourceConfig], folder: Path) -> list[Path]:
    """Brings the index of every source of tars in `folder` up to date; returns the index files.

    One process does it; then all may open the sources with that folder, without reading the tars.

    Raises:
      ValueError: tars that are missing, or files that are none.
      OSError: the folder cannot be written.
    """
    files = []
    for source in sources:
        if source.kind == "pairs":
            file, paths = _index_file(source, folder), find_files(source.path, _where(source, "path"))
            update_index(paths, caption_suffix(source.caption_key), file)
            files.append(file)
    return files


def _index_file(source: SourceConfig, folder: Path) -> Path:
    """Each path and kind of caption has its own."""
    text = f"{source.path}\n{caption_suffix(source.caption_key)}"
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pairs"


def open_records(
    source: SourceConfig, mode: str, tokenizer: Tokenizer, index_folder: Path | None = None
) -> Records:
    """The records that a source's config names; `index_folder` is that of `index_sources`, or None.

    Raises:
      ValueError: files that are missing or of another kind, or that hold no record.
    """
    paths = find_files(source.path, _where(source, "path"))
    if source.kind == "pairs":
        index = None if index_folder is None else _index_file(source, index_folder)
        return Pairs(paths, mode, source.caption_key, index)
    records = JsonRecords(paths)
    if not len(records):
        raise ValueError(f"{_where(source, 'path')}: {source.path!r} holds no record; give files that do.")
    images = None
    if source.images is not None:
        images = open_images(find_files(source.images, _where(source, "images")))
    if source.kind == "conversations":
        return Conversations(records, images, _template(source, tokenizer))
    assert images is not None
    if source.kind == "interleaved":
        return Documents(records, images, mode, source.min_similarity)
    return Instructions(records, images, mode, source.min_similarity, _template(source, tokenizer))


def open_mixture(
    sources: Sequence[SourceConfig],
    mode: str,
    seed: int,
    tokenizer: Tokenizer,
    index_folder: Path | None = None,
) -> Mixture:
    """Opens every source; `index_folder` is that of `index_sources`, or None.

    Raises:
      ValueError: files that are missing or of another kind, or that hold no record.
    """
    records = [open_records(source, mode, tokenizer, index_folder) for source in sources]
    return Mixture(records, [source.weight for source in sources], seed)


class Mixture:
    """Document `index` of an endless mixture: a function of (seed, index, and the sources' sizes).

    Each source takes part by its weight, exactly; each record of a source comes once an epoch.
    """

    def __init__(self, records: Sequence[Records], weights: Sequence[float], seed: int):
        import grain  # slow to import, and only here

        self.records = list(records)
        orders = []
        for at, source in enumerate(self.records):
            numbers = grain.MapDataset.range(len(source)).shuffle(seed=_seed(seed, at)).repeat()
            orders.append(numbers.map(lambda number, at=at: (at, number)))
        self._order = orders[0]
        if len(orders) > 1:
            mixed = grain.MapDataset.mix(orders, list(weights))
            seed = _seed(seed, len(orders))
            self._order = grain.experimental.WindowShuffleMapDataset(mixed, window_size=_WINDOW, seed=seed)

    def document(self, rng: np.random.Generator, index: int) -> list[Piece]:
        """As `pipeline.DocumentSource` says; BrokenRecord where the record cannot be used."""
        at, number = self._order[index]
        return self.records[at].document(int(number), rng)


def _seed(seed: int, at: int) -> int:
    return int(np.random.SeedSequence((seed, at)).generate_state(1)[0])


def _template(source: SourceConfig, tokenizer: Tokenizer) -> ChatTemplate:
    try:
        template = template_of(source.template, tokenizer)
        conversation(["question", "answer"] * 2, template=template)
    except ValueError as error:
        raise ValueError(f"{_where(source, 'template')}: {error}") from error
    return template


def _where(source: SourceConfig, field: str) -> str:
    return f"data.sources ({source.kind}) {field}"
