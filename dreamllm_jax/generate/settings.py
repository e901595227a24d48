"""The keyword arguments of `DreamLLM`'s methods, as types: editors complete them, type checkers check them.

Each has the meaning and the default that the method documents; None takes the setting from the model's
`GenerationConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

Seed = int | Sequence[int]


class TextSettings(TypedDict, total=False):
    """The settings of `generate_text`."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: Seed


class DrawingSettings(TypedDict, total=False):
    """The settings of everything that draws."""

    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    sampler: str | None
    eta: float | None


class ImageSettings(DrawingSettings, total=False):
    """The settings of `generate_images`."""

    num_images_per_prompt: int
    seed: Seed


class DocumentSettings(TextSettings, DrawingSettings, total=False):
    """The settings of `generate_document`."""

    max_images: int | None
