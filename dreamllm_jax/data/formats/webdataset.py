"""Image-text pairs from webdataset tars: files that share a key, `000042.jpg` beside `000042.txt`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreamllm_jax.data.archives import Member, read_member
from dreamllm_jax.data.files import BrokenRecord
from dreamllm_jax.data.formats.base import Format, FormatContext
from dreamllm_jax.data.formats.tar_index import index_tars, update_index
from dreamllm_jax.data.pieces import Piece, pair


@dataclasses.dataclass(frozen=True)
class PairsOptions:
    """Captions are the `txt` beside the image, or with `caption_key` that key of the `json`."""

    caption_key: str | None = None

    @property
    def suffix(self) -> str:
        """Which file of a sample holds the caption."""
        return ".txt" if self.caption_key is None else ".json"


class Pairs(Format):
    """The pairs of many tars, each in one read of the image and one of the caption.

    Opening reads the headers of every tar that the index does not know, and keeps 24 bytes a pair.
    """

    Options = PairsOptions

    @classmethod
    def index_key(cls, options: PairsOptions) -> str:
        return options.suffix

    @classmethod
    def update_index(cls, paths: Sequence[Path], options: PairsOptions, file: Path) -> None:
        update_index(paths, options.suffix, file)

    def __init__(self, paths: Sequence[Path], options: PairsOptions, context: FormatContext):
        """Opens the tars; incomplete pairs are left out, with a warning.

        Raises:
          ValueError: a file is not a tar, or there is not a single complete pair.
        """
        self.paths, self.mode, self.caption_key = list(paths), context.mode, options.caption_key
        tars = index_tars(self.paths, options.suffix, context.index)
        self._pairs = np.concatenate([tar.pairs for tar in tars])
        self._ends = np.array(list(itertools.accumulate(len(tar.pairs) for tar in tars)), np.int64)
        incomplete = sum(tar.incomplete for tar in tars)
        if not len(self):
            raise ValueError(
                f"{self.paths[0]} (of {len(self.paths)} tars): no image has its {options.suffix} beside "
                "it; set caption_key for captions in json files, leave it out for txt, or correct the path."
            )
        if incomplete:
            warnings.warn(
                f"{self.paths[0]} (of {len(self.paths)} tars): {incomplete} pairs lack an image or its "
                f"{options.suffix} and are left out; {len(self)} are complete.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Returns pair `number`: the image, then its caption, or the other way round, as the mode says.

        Raises:
          BrokenRecord: the caption is empty or cannot be read.
        """
        entry = self._pairs[number]
        path = self.paths[int(np.searchsorted(self._ends, number, side="right"))]
        image = read_member(path, Member("", int(entry["image"]), int(entry["image_size"])))
        data = read_member(path, Member("", int(entry["caption"]), int(entry["caption_size"])))
        return pair(image, self._caption(data, f"{path}: pair {number}"), self.mode, rng)

    def _caption(self, data: bytes, name: str) -> str:
        try:
            text = data.decode("utf-8")
            caption = text if self.caption_key is None else json.loads(text)[self.caption_key]
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenRecord(f"{name} is left out: its caption cannot be read ({error!r}).") from error
        if not isinstance(caption, str) or not caption.strip():
            raise BrokenRecord(f"{name} is left out: it has no caption.")
        return caption.strip()
