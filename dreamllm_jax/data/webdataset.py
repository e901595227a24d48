"""Image-text pairs from webdataset tars: files that share a key, `000042.jpg` beside `000042.txt`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dreamllm_jax.data.archives import IMAGE_SUFFIXES, Member, members, read_member
from dreamllm_jax.data.files import BrokenRecord
from dreamllm_jax.data.pieces import Piece, check_mode, pair

# One pair: its tar, and where the picture and its caption lie in it.
_ENTRY = np.dtype(
    [("tar", "u4"), ("image", "i8"), ("image_size", "u4"), ("caption", "i8"), ("caption_size", "u4")]
)


class Pairs:
    """The pairs of many tars, each in one read of the picture and one of the caption.

    Opening reads every header of every tar, and keeps 28 bytes a pair.
    """

    def __init__(self, paths: Sequence[Path], mode: str, caption_key: str | None = None):
        """Captions are the `txt`, or with `caption_key` that key of the `json`.

        Raises:
          ValueError: an unknown mode, a file that is no tar, or tars without a single whole pair.
        """
        check_mode(mode)
        self.paths, self.mode, self.caption_key = list(paths), mode, caption_key
        suffix = ".txt" if caption_key is None else ".json"
        entries, incomplete = [], 0
        for at, path in enumerate(tqdm(self.paths, "index", unit="tar", disable=len(self.paths) < 10)):
            found, missing = _index(path, at, suffix)
            entries.append(found)
            incomplete += missing
        self._entries = np.concatenate(entries)
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
        return len(self._entries)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Pair `number`, in one of the two directions as the mode says.

        Raises:
          BrokenRecord: its caption is empty or unreadable.
        """
        entry = self._entries[number]
        path = self.paths[entry["tar"]]
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


def _index(path: Path, at: int, suffix: str) -> tuple[np.ndarray, int]:
    """The whole pairs of a tar, and how many samples are not whole."""
    rows, incomplete = [], 0
    for sample in _samples(path):
        image = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), None)
        if image is None or suffix not in sample:
            incomplete += 1
            continue
        caption = sample[suffix]
        rows.append((at, image.offset, image.size, caption.offset, caption.size))
    return np.array(rows, _ENTRY), incomplete


def _samples(path: Path) -> Iterator[dict[str, Member]]:
    """Neighbours with the same name up to the first dot, by what follows it."""
    sample: dict[str, Member] = {}
    current = None
    for member in members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if (folder, stem) != current:
            if sample:
                yield sample
            sample, current = {}, (folder, stem)
        sample.setdefault("." + suffix.lower(), member)
    if sample:
        yield sample
