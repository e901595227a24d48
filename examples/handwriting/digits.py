"""scikit-learn's 1,797 handwritten digits (8x8) as pictures: four fifths to train on, one fifth held out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

# The largest changes of augmentation: shift in pixels of the 8x8 original, degrees, and factor.
_SHIFT, _ROTATION, _SCALE = 0.3, 8.0, 0.08
_VARIANTS = 32


class Digits:
    """One side of the split: pictures of `size` x `size` pixels, labels, and the 8x8 originals."""

    def __init__(self, originals: Float[np.ndarray, "n 8 8"], labels: Int[np.ndarray, " n"], size: int):
        self.originals, self.labels, self.size = originals, labels, size
        gray = (originals * (255 / 16)).round().astype(np.uint8)
        self.images = np.stack([_rgb(_upsample(g, size)) for g in gray])
        self.images.flags.writeable = False
        # At twice the resolution, so that moving a picture and sampling it down blurs little.
        self._fine = [Image.fromarray(_upsample(g, 2 * size)) for g in gray]
        self._variants: dict[int, np.ndarray] = {}
        self._by_digit = [np.flatnonzero(labels == digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def picture(
        self, digit: int, rng: np.random.Generator, augment: bool = False
    ) -> UInt8[np.ndarray, "size size 3"]:
        """Returns a random picture of `digit` (read-only); `augment` shifts, rotates and scales it a
        little."""
        candidates = self._by_digit[digit]
        index = int(candidates[int(rng.integers(len(candidates)))])
        return self._variant(index, int(rng.integers(_VARIANTS))) if augment else self.images[index]

    def _variant(self, index: int, variant: int) -> UInt8[np.ndarray, "size size 3"]:
        """Returns a variant of a picture, made on first use: the slowest part of making a document."""
        key = index * _VARIANTS + variant
        if key not in self._variants:
            moves = np.random.default_rng((index, variant)).uniform(-1, 1, 4)
            gray = self._moved(index, *(float(m) for m in moves))
            self._variants[key] = np.broadcast_to(gray[:, :, None], (self.size, self.size, 3))
        return self._variants[key]

    def _moved(
        self, index: int, dx: float, dy: float, turn: float, zoom: float
    ) -> UInt8[np.ndarray, "size size"]:
        """Returns the picture shifted, rotated and scaled; each argument lies in [-1, 1]."""
        angle = np.deg2rad(_ROTATION) * turn
        factor = 2 / (1 + _SCALE * zoom)  # 2: from the fine grid
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        center = self.size / 2
        x, y = center + dx * _SHIFT * self.size / 8, center + dy * _SHIFT * self.size / 8
        affine = (cos, sin, self.size - cos * x - sin * y, -sin, cos, self.size + sin * x - cos * y)
        moved = self._fine[index].transform(
            (self.size, self.size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
        )
        return np.asarray(moved)


def _upsample(gray: UInt8[np.ndarray, "8 8"], size: int) -> UInt8[np.ndarray, "size size"]:
    return np.asarray(Image.fromarray(gray).resize((size, size), Image.Resampling.BICUBIC))


def _rgb(gray: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.repeat(gray[:, :, None], 3, axis=2)


@functools.lru_cache(maxsize=8)
def load_digits(size: int = 16, seed: int = 0) -> tuple[Digits, Digits]:
    """Returns training and held-out digits: four fifths and one fifth of each class, fixed by `seed`."""
    try:
        from sklearn.datasets import load_digits as load  # slow to import, and only here
    except ImportError as error:
        raise ValueError(
            "The handwriting is scikit-learn's, which is not installed; pip install '.[examples]'."
        ) from error

    data: Any = load()
    rng = np.random.default_rng(seed)
    training, held_out = [], []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(data.target == digit))
        cut = round(len(order) * 0.8)
        training += list(order[:cut])
        held_out += list(order[cut:])

    def side(indices: list) -> Digits:
        index = np.sort(np.array(indices))
        return Digits(data.images[index], data.target[index], size)

    return side(training), side(held_out)
