"""Prompts to a batch: one prompt per row, padded on the right to one of few lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.data.chat import template_of
from dreamllm_jax.data.images import to_vision
from dreamllm_jax.data.sequences import encode_prompt
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.document import Document

Prompt = str | Document


def as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """Returns the prompts as a list, and whether a list was given.

    Raises:
      ValueError: the prompt is neither a string nor a Document nor a list of them.
    """
    if isinstance(prompt, str | Document):
        return [prompt], False
    prompts: list[Any] = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    for p in prompts:
        if not isinstance(p, str | Document):
            raise ValueError(
                f"A prompt is a {type(p).__name__}; give a string or a Document (strings and PIL images in "
                "order), or a list of them."
            )
    if not prompts:
        raise ValueError("The list of prompts is empty; give at least one prompt.")
    return prompts, True


def end_tokens(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """Returns the ids that end what the model writes: `</s>`, and the token that closes an answer.

    For example ChatML closes an answer by `<|im_end|>`, which may not be the tokenizer's end token.

    Raises:
      ValueError: the template is unknown or cannot be used.
    """
    closing = template_of(template, tokenizer).closing if template else None
    return [tokenizer.special.eos, *([] if closing is None else [tokenizer.token_id(closing)])]


def bucket_length(size: int, limit: int) -> int:
    """Rounds a length up so that few shapes are compiled: to a power of two from 16, or a multiple of 256.

    The result is at most `limit`. For example 17 -> 32, 257 -> 512, 600 -> 768.
    """
    up = 1 << max(4, (size - 1).bit_length()) if size <= 256 else -(-size // 256) * 256
    return min(up, limit)


def cache_capacity(size: int, limit: int) -> int:
    """Returns a capacity of at least `size` and at most `limit`, so that few sizes of caches are compiled.

    A cache has one entry more than its capacity (see `KVCache`): 600 tokens get 767.
    """
    return bucket_length(size + 1, limit + 1) - 1


def longest_prompt(batch: Batch) -> int:
    """Returns the number of tokens of the longest row."""
    return int((batch.segment_ids > 0).sum(-1).max())


def prompt_batch(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: DreamLLMConfig, template: str | None
) -> Batch:
    """Returns the rows of some prompts, as numpy arrays; the model sees the images in them.

    Raises:
      ValueError: a prompt has more tokens than the context, or images for a model that cannot see.
    """
    limit = config.context_length
    for prompt in prompts:
        if isinstance(prompt, Document) and prompt.images and not config.sees:
            raise ValueError(
                f"The prompt has {len(prompt.images)} images, but this model has no vision tower; use text "
                "only."
            )
    sequences = [encode_prompt(p, tokenizer, config.num_patches, limit - 1, None, template) for p in prompts]
    rows, length = len(sequences), bucket_length(max(len(s.tokens) for s in sequences), limit)
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
