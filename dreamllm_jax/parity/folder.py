"""Compares all numbers of a folder: the training step, greedy tokens, an image."""

from __future__ import annotations

from pathlib import Path

from dreamllm_jax.parity.case import open_case
from dreamllm_jax.parity.generation import compare_greedy, compare_image
from dreamllm_jax.parity.step import compare_step

# The largest errors allowed, by the first word of a quantity's name. loss: relative; out and t2i: absolute;
# grad: norm of the difference divided by the norm; gen: number of differing tokens; tokenizer and sequences:
# number of rows.
BOUNDS = {"loss": 1e-5, "out": 1e-4, "grad": 1e-4, "gen": 0, "t2i": 1e-3, "tokenizer": 0, "sequences": 0}


def compare_folder(folder: str | Path) -> dict[str, float]:
    """Returns {quantity: error} of a folder laid out as `tests/golden/dreamllm-a`.

    Generations that the reference did not record are left out.

    Raises:
      ValueError: the folder lacks a file, or its checkpoint does not fit its config.
    """
    case = open_case(folder)
    errors = compare_step(case)
    if "gen.greedy_ids" in case.reference:
        errors |= compare_greedy(case)
    if "t2i.init_latents" in case.reference:
        errors |= compare_image(case)
    return errors
