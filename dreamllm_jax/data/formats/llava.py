"""Conversations in LLaVA's form: turns of human and gpt, with `<image>` where the picture stands."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamllm_jax.data.archives import Images
from dreamllm_jax.data.chat import ChatTemplate, conversation
from dreamllm_jax.data.files import BrokenRecord, JsonRecords
from dreamllm_jax.data.images import ImageLike
from dreamllm_jax.data.pieces import Piece

USER, ASSISTANT = ("human", "user"), ("gpt", "assistant", "obj365", "vg")
_MARKERS = ("<image>", "<dream>")


class Conversations:
    """Records `{"id", "image", "conversations": [{"from", "value"}]}`; without an image, text alone.

    `image` may be a list. One image serves every marker: `<image>` (seen) and `<dream>` (dreamed, then
    seen). What an assistant says before the first question, and a question without an answer, are left out.
    """

    def __init__(self, records: JsonRecords, images: Images | None, template: ChatTemplate):
        self.records, self.images, self.template = records, images, template

    def __len__(self) -> int:
        return len(self.records)

    def document(self, number: int, rng: np.random.Generator) -> list[Piece]:
        """Conversation `number`; its answers are learned.

        Raises:
          BrokenRecord: turns that do not alternate, markers without pictures, or a missing field.
        """
        record = self.records[number]
        try:
            turns = _turns(record)
            markers = sum(turn.count(marker) for turn in turns for marker in _MARKERS)
            return conversation(turns, self._pictures(record, markers), self.template)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BrokenRecord(f"conversation {number} is left out: {error!r}.") from error

    def _pictures(self, record: dict[str, Any], markers: int) -> list[ImageLike]:
        """A picture for each marker."""
        names = record["image"] if "image" in record else None
        if names is None or not markers:
            return []
        if self.images is None:
            raise ValueError("it has an image, but the source has no images folder")
        if isinstance(names, str):
            names = [names] * markers
        return [self.images.find(name) for name in names]


def _turns(record: dict[str, Any]) -> list[str]:
    """Values of user and assistant by turns."""
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
