"""Interleaved documents in MMC4's form (arXiv 2304.06939), and instructions that such a document answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dreamllm_jax.data.archives import Images
from dreamllm_jax.data.chat import ChatTemplate, conversation
from dreamllm_jax.data.files import BrokenRecord, JsonRecords
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import Picture, Piece, check_mode, interleaved


class Documents:
    """`text_list`, and `image_info` with the sentence that each picture follows (`matched_text_index`)."""

    def __init__(self, records: JsonRecords, images: Images, mode: str, min_similarity: float | None = None):
        """Pictures whose `matched_sim` is below `min_similarity` are left out.

        Raises:
          ValueError: an unknown mode.
        """
        check_mode(mode)
        self.records, self.images = records, images
        self.mode, self.min_similarity = mode, min_similarity

    def __len__(self) -> int:
        return len(self.records)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Document `number`, all of it learned.

        Raises:
          BrokenRecord: it lacks a field, or a field is not what it should be.
        """
        return interleaved(self.parts(self.records[number], number), self.mode)

    def parts(self, record: dict[str, Any], number: int) -> list[str | ImageLike]:
        """Sentences and pictures in reading order; pictures by name still."""
        sentences, places = _fields(record, number, self.min_similarity)
        return interleave(sentences, [(place, self.images.find(name)) for place, name in places])


class Instructions(Documents):
    """InstructMMC4: a document with the `instruction` that it answers, in a conversation template."""

    def __init__(
        self,
        records: JsonRecords,
        images: Images,
        mode: str,
        min_similarity: float | None,
        template: ChatTemplate,
    ):
        super().__init__(records, images, mode, min_similarity)
        self.template = template

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Record `number`; the answer is learned.

        Raises:
          BrokenRecord: it lacks a field, or a field is not what it should be.
        """
        record = self.records[number]
        if not isinstance(record.get("instruction"), str):
            raise BrokenRecord(f"record {number} is left out: it has no instruction.")
        answer = interleaved(self.parts(record, number), self.mode)[:-1]  # the turn has its own end
        spoken = [piece if isinstance(piece, Picture) else piece.text for piece in answer]
        return conversation([[record["instruction"].strip()], spoken], template=self.template)


def interleave(sentences: Sequence[str], pictures: Iterable[tuple[int, ImageLike]]) -> list[str | ImageLike]:
    """Text and pictures in reading order: sentences joined by a space up to the next picture.

    `pictures` are in order, each with the number of the sentence that it follows.
    """
    parts: list[str | ImageLike] = []
    first = 0
    for place, picture in pictures:
        parts += [" ".join(sentences[first : place + 1]), picture]
        first = max(first, place + 1)
    return [*parts, " ".join(sentences[first:])]


def _fields(
    record: dict[str, Any], number: int, min_similarity: float | None
) -> tuple[list[str], list[tuple[int, str]]]:
    """Sentences, and (sentence it follows, name) of each picture in order."""
    places = []
    try:
        sentences = [sentence.strip() for sentence in record["text_list"]]
        for info in record["image_info"]:
            place, name = int(info["matched_text_index"]), str(info["image_name"])
            if not 0 <= place < len(sentences):
                raise ValueError(f"sentence {place} of {len(sentences)}")
            similarity = info["matched_sim"] if "matched_sim" in info else None
            if min_similarity is None or similarity is None or similarity >= min_similarity:
                places.append((place, name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenRecord(f"record {number} is left out: {error!r} in its fields.") from error
    return sentences, sorted(places, key=lambda at: at[0])
