"""Conversations in LLaVA's form: turns of human and gpt, with `<image>` where the image stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.data.archives import open_images
from dreamllm_jax.data.chat import conversation
from dreamllm_jax.data.files import BrokenRecord, JsonRecords, find_files
from dreamllm_jax.data.formats.base import Format, FormatContext, conversation_template
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import Piece
from dreamllm_jax.data.tokenizer import Tokenizer

USER, ASSISTANT = ("human", "user"), ("gpt", "assistant", "obj365", "vg")
_MARKERS = ("<image>", "<dream>")


@dataclasses.dataclass(frozen=True)
class ConversationsOptions:
    """`images` is a folder, or zips or tars, of the images (None: the conversations have none).

    `template` is what conversations are written in.
    """

    images: str | None = None
    template: str = "vicuna_v1.1"


class Conversations(Format):
    """Records `{"id", "image", "conversations": [{"from", "value"}]}`; without an image, text alone.

    `image` may be a list. A single image serves every marker: `<image>` (seen) and `<dream>` (dreamed, then
    seen). An assistant's turn before the first question is left out, and so is a question without an answer.
    """

    Options = ConversationsOptions

    @classmethod
    def check(cls, options: ConversationsOptions, tokenizer: Tokenizer) -> None:
        if options.images is not None:
            find_files(options.images, "images")
        conversation_template(options.template, tokenizer)

    def __init__(self, paths: Sequence[Path], options: ConversationsOptions, context: FormatContext):
        self.records, self.images = JsonRecords(paths), None
        if options.images is not None:
            self.images = open_images(find_files(options.images, "images"))
        self.template = conversation_template(options.template, context.tokenizer)

    def __len__(self) -> int:
        return len(self.records)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Returns conversation `number`; its answers are learned.

        Raises:
          BrokenRecord: the turns do not alternate, a marker has no image, or a field is missing.
        """
        record = self.records[number]
        try:
            turns = _turns(record)
            markers = sum(turn.count(marker) for turn in turns for marker in _MARKERS)
            return conversation(turns, self._pictures(record, markers), self.template)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenRecord(f"conversation {number} is left out: {error!r}.") from error

    def _pictures(self, record: dict[str, Any], markers: int) -> list[ImageLike]:
        """Returns an image for each marker."""
        names = record["image"] if "image" in record else None
        if names is None or not markers:
            return []
        if self.images is None:
            raise ValueError("it has an image, but the source's options name no images")
        if isinstance(names, str):
            names = [names] * markers
        return [self.images.find(name) for name in names]


def _turns(record: dict[str, Any]) -> list[str]:
    """Returns the texts of user and assistant, alternating."""
    turns: list[str] = []
    for turn in record["conversations"]:
        role, value = turn["from"], turn["value"]
        expected = ASSISTANT if len(turns) % 2 else USER
        if role not in expected:
            if not turns and role in ASSISTANT:
                continue
            raise ValueError(f"turn {len(turns)} is from {role!r}, expected one of {expected}")
        turns.append(value.strip())
    if len(turns) % 2:
        turns.pop()
    return turns
