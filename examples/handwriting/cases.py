"""Prompts that never occur in training, and the right continuation of each."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from PIL import Image

from dreamllm_jax.document import Document
from examples.handwriting.digits import load_digits
from examples.handwriting.words import HELD_OUT_COUNTS, HELD_OUT_SUMS, NEXT, WORDS, Part, add, count


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and the one right continuation: words (str), and digits (int) to draw."""

    kind: Literal["count", "sum", "next"]
    prompt: str | Document
    expected: tuple[Part, ...]


def unseen_cases(next_per_digit: int = 3, size: int = 16) -> list[Case]:
    """Returns all held-out counts and sums, and `What comes next?` after held-out pictures."""
    cases = [Case("count", *count(*bounds)) for bounds in HELD_OUT_COUNTS]
    cases += [Case("sum", *add(*terms)) for terms in HELD_OUT_SUMS]
    held_out = load_digits(size)[1]
    for digit in range(9):
        for index in np.flatnonzero(held_out.labels == digit)[:next_per_digit]:
            prompt = Document([Image.fromarray(held_out.images[index]), NEXT])
            cases.append(Case("next", prompt, (WORDS[digit + 1], digit + 1)))
    return cases
