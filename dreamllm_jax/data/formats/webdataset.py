"""Image-text pairs from webdataset tars: files that share a key, `000042.jpg` beside `000042.txt`."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreamllm_jax.data.archives import Member, read_member
from dreamllm_jax.data.files import BrokenRecord
from dreamllm_jax.data.formats.tar_index import index_tars
from dreamllm_jax.data.pieces import Piece, check_mode, pair


def caption_suffix(caption_key: str | None) -> str:
    """Which file of a sample holds the caption."""
    return ".txt" if caption_key is None else ".json"


class Pairs:
    """The pairs of many tars, each in one read of the picture and one of the caption.

    Opening reads every header of every tar that `index` does not know, and keeps 24 bytes a pair.
    """

    def __init__(
        self, paths: Sequence[Path], mode: str, caption_key: str | None = None, index: Path | None = None
    ):
        """Captions are the `txt`, or with `caption_key` that key of the `json`.

        `index` is a file of `tar_index.update_index`, or None.

        Raises:
          ValueError: an unknown mode, a file that is no tar, or tars without a single whole pair.
        """
        check_mode(mode)
        self.paths, self.mode, self.caption_key = list(paths), mode, caption_key
        suffix = caption_suffix(caption_key)
        tars = index_tars(self.paths, suffix, index)
        self._places = np.concatenate([tar.places for tar in tars])
        self._ends = np.array(list(itertools.accumulate(len(tar.places) for tar in tars)), np.int64)
        incomplete = sum(tar.incomplete for tar in tars)
        if not len(self):
            raise ValueError(
                f"{self.paths[0]} (of {len(self.paths)} tars): no picture has its {suffix} beside it; set "
                "caption_key for captions in json files, leave it out for txt, or correct the path."
            )
        if incomplete:
            warnings.warn(
                f"{self.paths[0]} (of {len(self.paths)} tars): {incomplete} pairs lack a picture or its "
                f"{suffix} and are left out; {len(self)} are whole.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._places)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Pair `number`, in one of the two directions as the mode says.

        Raises:
          BrokenRecord: its caption is empty or unreadable.
        """
        place = self._places[number]
        path = self.paths[int(np.searchsorted(self._ends, number, side="right"))]
        image = read_member(path, Member("", int(place["image"]), int(place["image_size"])))
        data = read_member(path, Member("", int(place["caption"]), int(place["caption_size"])))
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
