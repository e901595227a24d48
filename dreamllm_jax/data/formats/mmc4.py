"""Interleaved documents in MMC4's form (arXiv 2304.06939)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.data.archives import Images, open_images
from dreamllm_jax.data.files import BrokenRecord, JsonRecords, find_files
from dreamllm_jax.data.formats.base import Format, FormatContext
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import Piece, interleaved
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class InterleavedOptions:
    """`images` is a folder, or zips or tars, of the images; globs and ranges as in a path.

    Images whose `matched_sim` is below `min_similarity` are left out.
    """

    images: str
    min_similarity: float | None = None


class Interleaved(Format):
    """Records with `text_list`, and `image_info` that names the sentence which each image follows.

    Example: the sentences ["One.", "Two.", "Three."] and an image with `matched_text_index` 1 become
    "One. Two.", the image, "Three.".
    """

    Options = InterleavedOptions

    @classmethod
    def check(cls, options: InterleavedOptions, tokenizer: Tokenizer) -> None:
        find_files(options.images, "images")

    def __init__(self, paths: Sequence[Path], options: InterleavedOptions, context: FormatContext):
        self.records, self.images = JsonRecords(paths), open_images(find_files(options.images, "images"))
        self.mode, self.min_similarity = context.mode, options.min_similarity

    def __len__(self) -> int:
        return len(self.records)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Returns document `number`, all of it learned.

        Raises:
          BrokenRecord: a field is missing or malformed.
        """
        parts = read_document(self.records[number], number, self.images, self.min_similarity)
        return interleaved(parts, self.mode)


def read_document(
    record: dict[str, Any], number: int, images: Images, min_similarity: float | None
) -> list[str | ImageLike]:
    """Returns the text and images of an MMC4 record in reading order, images not yet decoded.

    Raises:
      BrokenRecord: a field is missing or malformed.
    """
    sentences, pictures = _fields(record, number, min_similarity)
    return interleave(sentences, [(sentence, images.find(name)) for sentence, name in pictures])


def interleave(sentences: Sequence[str], pictures: Iterable[tuple[int, ImageLike]]) -> list[str | ImageLike]:
    """Returns text and images in reading order: sentences joined by a space up to the next image.

    `pictures` are in order, each with the index of the sentence that it follows.

    Example:
      >>> interleave(["One.", "Two.", "Three."], [(1, b"...")])
      ['One. Two.', b'...', 'Three.']
    """
    parts: list[str | ImageLike] = []
    first = 0
    for sentence, picture in pictures:
        parts += [" ".join(sentences[first : sentence + 1]), picture]
        first = max(first, sentence + 1)
    return [*parts, " ".join(sentences[first:])]


def _fields(
    record: dict[str, Any], number: int, min_similarity: float | None
) -> tuple[list[str], list[tuple[int, str]]]:
    """Returns sentences, and for each image in order (index of the sentence it follows, name)."""
    pictures = []
    try:
        sentences = [sentence.strip() for sentence in record["text_list"]]
        for info in record["image_info"]:
            sentence, name = int(info["matched_text_index"]), str(info["image_name"])
            if not 0 <= sentence < len(sentences):
                raise ValueError(f"sentence {sentence} of {len(sentences)}")
            similarity = info["matched_sim"] if "matched_sim" in info else None
            if min_similarity is None or similarity is None or similarity >= min_similarity:
                pictures.append((sentence, name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenRecord(f"record {number} is left out: {error!r} in its fields.") from error
    return sentences, sorted(pictures, key=lambda picture: picture[0])
