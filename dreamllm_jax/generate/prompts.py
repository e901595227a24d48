"""Prompts to rows: one prompt a row, padded on the right to a length that compiles seldom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.data.images import to_vision
from dreamllm_jax.data.sequences import encode_prompt
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.document import Document

Prompt = str | Document


def as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(prompts, whether a list was given).

    Raises:
      ValueError: something that is neither a string, a Document nor a list of them.
    """
    if isinstance(prompt, str | Document):
        return [prompt], False
    prompts = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    for p in prompts:
        if not isinstance(p, str | Document):
            raise ValueError(
                f"A prompt is a {type(p).__name__}; give a string or a Document (strings and PIL images in "
                "order), or a list of them."
            )
    if not prompts:
        raise ValueError("The list of prompts is empty; give at least one prompt.")
    return prompts, True


def bucket(size: int, limit: int) -> int:
    """The next power of two from 16, or multiple of 256, at most `limit`: few shapes, few compilations."""
    up = 1 << max(4, (size - 1).bit_length()) if size <= 256 else -(-size // 256) * 256
    return min(up, limit)


def longest_prompt(batch: Batch) -> int:
    """Tokens of the longest row."""
    return int((batch.segment_ids > 0).sum(-1).max())


def prompt_batch(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: DreamLLMConfig, template: str | None
) -> Batch:
    """The rows of some prompts (numpy), prompt pictures seen.

    Raises:
      ValueError: a prompt with more tokens than the context, or with pictures for a model that cannot see.
    """
    limit = config.context_length
    for prompt in prompts:
        if isinstance(prompt, Document) and prompt.images and not config.sees:
            raise ValueError(
                f"The prompt has {len(prompt.images)} pictures, but this model has no vision tower; use text "
                "only."
            )
    sequences = [encode_prompt(p, tokenizer, config.num_patches, limit - 1, None, template) for p in prompts]
    rows, length = len(sequences), bucket(max(len(s.tokens) for s in sequences), limit)
    most = max(len(s.images) for s in sequences)
    tokens = np.full((rows, length), tokenizer.special.pad, np.int32)
    slots = np.full((rows, length), -1, np.int32)
    segments = np.zeros((rows, length), np.int32)
    images = None
    if most:
        assert config.vision is not None
        images = np.zeros((rows, most, config.vision.image_size, config.vision.image_size, 3), np.uint8)
    for row, sequence in enumerate(sequences):
        end = len(sequence.tokens)
        tokens[row, :end] = sequence.tokens
        slots[row, :end] = sequence.image_slots
        segments[row, :end] = 1
        for k, image in enumerate(sequence.images):
            assert images is not None and config.vision is not None
            images[row, k] = to_vision(image, config.vision.image_size)
    none = np.full((rows, length), -1, np.int32)
    return Batch(
        tokens=tokens,
        targets=none,
        segment_ids=segments,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        loss_weights=np.zeros((rows, length), np.float32),
        image_slots=slots,
        dream_slots=none,
        image_mask=np.zeros((rows, max(1, most)), bool),
        dream_mask=np.zeros((rows, 1), bool),
        null_dream=np.full((rows,), -1, np.int32),
        images=images,
    )
