"""How far the results of the two sides may be apart; beyond, a comparison of their times has no meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# The largest errors allowed.
#   loss: relative difference, in each of two steps
#   logits, attention: norm of the difference, divided by the norm
#   tokens: share of tokens that differ
#   image: mean absolute difference of the bytes
# In bfloat16 the two sides round differently. One different token changes all tokens after it, so tokens are
# not compared.
BOUNDS = {
    "float32": {"loss": 1e-4, "logits": 1e-4, "tokens": 0.0, "image": 0.1, "attention": 1e-4},
    "bfloat16": {"loss": 2e-2, "logits": 5e-2, "tokens": 1.0, "image": 16.0, "attention": 5e-2},
}


def relative_norm(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the norm of the difference, divided by the norm."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def byte_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the mean absolute difference of two images' bytes."""
    return float(np.abs(ours.astype(np.float64) - theirs).mean())


ERRORS: dict[str, Callable[[Any, Any], float]] = {
    "loss": lambda ours, theirs: float(np.max(np.abs(theirs - ours) / np.abs(ours))),
    "logits": relative_norm,
    "attention": relative_norm,
    "tokens": lambda ours, theirs: float((ours != theirs).mean()),
    "image": byte_difference,
}


def errors_between(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the error of each result that both sides have."""
    return {kind: ERRORS[kind](ours[kind], theirs[kind]) for kind in ours if kind in theirs}


def exceeding(errors: Mapping[str, float], dtype: str) -> dict[str, float]:
    """Returns the errors that are not within their bounds."""
    return {kind: error for kind, error in errors.items() if not error <= BOUNDS[dtype][kind]}
