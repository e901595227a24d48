"""How errors are counted, here and in `benchmarks.fidelity`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import numpy as np


def absolute_error(ours: np.ndarray | jax.Array, theirs: np.ndarray | jax.Array) -> float:
    """Returns the largest absolute difference."""
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs)).max())


def scaled_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest absolute difference of values that are scaled to a root mean square of 1."""
    return absolute_error(ours, theirs) / float(np.sqrt(np.square(theirs, dtype=np.float64).mean()))


def relative_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the norm of the difference divided by the norm."""
    difference = np.asarray(ours, np.float64) - theirs
    return float(np.linalg.norm(difference.ravel()) / np.linalg.norm(theirs.ravel().astype(np.float64)))


def exceeding(errors: Mapping[str, float], bounds: Mapping[str, float]) -> dict[str, float]:
    """Returns the errors that exceed their bounds; NaN exceeds any bound.

    The bound of a quantity is that of the first word of its name: `grad.llama/norm/scale` has the bound
    `grad`.
    """
    return {name: e for name, e in errors.items() if not e <= bounds[re.split(r"\W", name)[0]]}
