"""InstructMMC4: MMC4 documents, each with the instruction that it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from dreamllm_jax.data.archives import open_images
from dreamllm_jax.data.chat import conversation
from dreamllm_jax.data.files import BrokenRecord, JsonRecords, find_files
from dreamllm_jax.data.formats.base import Format, FormatContext, conversation_template
from dreamllm_jax.data.formats.mmc4 import read_document
from dreamllm_jax.data.pieces import Picture, Piece, Text, interleaved
from dreamllm_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class InstructionsOptions:
    """As `mmc4.InterleavedOptions`, and the `template` that conversations are written in."""

    images: str
    min_similarity: float | None = None
    template: str = "vicuna_v1.1"


class Instructions(Format):
    """MMC4's records with an `instruction`: the user's turn, which the document answers."""

    Options = InstructionsOptions

    @classmethod
    def check(cls, options: InstructionsOptions, tokenizer: Tokenizer) -> None:
        find_files(options.images, "images")
        conversation_template(options.template, tokenizer)

    def __init__(self, paths: Sequence[Path], options: InstructionsOptions, context: FormatContext):
        self.records, self.images = JsonRecords(paths), open_images(find_files(options.images, "images"))
        self.mode, self.min_similarity = context.mode, options.min_similarity
        self.template = conversation_template(options.template, context.tokenizer)

    def __len__(self) -> int:
        return len(self.records)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Returns record `number` as a conversation; the answer is learned.

        Raises:
          BrokenRecord: a field is missing or malformed.
        """
        record = self.records[number]
        if not isinstance(record.get("instruction"), str):
            raise BrokenRecord(f"record {number} is left out: it has no instruction.")
        parts = read_document(record, number, self.images, self.min_similarity)
        *answer, _ = interleaved(parts, self.mode)  # without its End: the turn has its own
        turn = [piece if isinstance(piece, Picture) else cast(Text, piece).text for piece in answer]
        return conversation([[record["instruction"].strip()], turn], template=self.template)
