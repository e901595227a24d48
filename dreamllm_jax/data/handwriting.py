"""The built-in corpus: scikit-learn's 1,797 real 8x8 handwritten digits, in words and pictures.

Three kinds of data, as DreamLLM trains on (and a fourth of words alone, see `numbers`):

    pairs          IMAGE <-> a handwritten seven
    conversations  IMAGE Which digit is this? -> seven
    documents      Count from three to five. three IMAGE four IMAGE five IMAGE
                   Write two plus five. IMAGE plus IMAGE equals IMAGE
                   IMAGE What comes next? eight IMAGE        (a nine has no next digit: never asked)

Words, counts and sums are those of `numbers`, which also says which of them training never sees; a
fifth of the pictures is held out too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from dreamllm_jax.config.data import KindWeights
from dreamllm_jax.data.chat import conversation
from dreamllm_jax.data.numbers import (
    HELD_OUT_COUNTS,
    HELD_OUT_SUMS,
    NEXT,
    QUESTION,
    WORDS,
    Part,
    add,
    caption,
    count,
    story,
    text_document,
)
from dreamllm_jax.data.pieces import (
    Picture,
    Piece,
    captioned,
    check_mode,
    interleaved,
    pair,
)
from dreamllm_jax.document import Document

# Largest changes of augmentation: in pixels of the 8x8 original, degrees, and factor.
_SHIFT, _ROTATION, _SCALE = 0.3, 8.0, 0.08
_VARIANTS = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt that training never saw, and the one right continuation: words (str) and digits (int)."""

    kind: Literal["count", "sum", "next"]
    prompt: str | Document
    expected: tuple[Part, ...]


class Digits:
    """One side of the split: pictures of `size` x `size`, labels, and the 8x8 originals."""

    def __init__(self, originals: Float[np.ndarray, "n 8 8"], labels: Int[np.ndarray, " n"], size: int):
        self.originals, self.labels, self.size = originals, labels, size
        gray = (originals * (255 / 16)).round().astype(np.uint8)
        self.images = np.stack([_rgb(_upsample(g, size)) for g in gray])
        self.images.flags.writeable = False
        # Twice as fine, so that moving and sampling down blurs little.
        self._fine = [Image.fromarray(_upsample(g, 2 * size)) for g in gray]
        self._variants: dict[int, np.ndarray] = {}
        self._by_digit = [np.flatnonzero(labels == digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def draw(
        self, digit: int, rng: np.random.Generator, augment: bool = False
    ) -> UInt8[np.ndarray, "size size 3"]:
        """A picture of `digit` (read-only); with `augment`, shifted, rotated and scaled a little."""
        candidates = self._by_digit[digit]
        index = int(candidates[int(rng.integers(len(candidates)))])
        return self._variant(index, int(rng.integers(_VARIANTS))) if augment else self.images[index]

    def _variant(self, index: int, variant: int) -> UInt8[np.ndarray, "size size 3"]:
        """One of a picture's variants, made when first drawn: making it costs more than all else here."""
        key = index * _VARIANTS + variant
        if key not in self._variants:
            moves = np.random.default_rng((index, variant)).uniform(-1, 1, 4)
            gray = self._moved(index, *(float(m) for m in moves))
            self._variants[key] = np.broadcast_to(gray[:, :, None], (self.size, self.size, 3))
        return self._variants[key]

    def _moved(
        self, index: int, dx: float, dy: float, turn: float, zoom: float
    ) -> UInt8[np.ndarray, "size size"]:
        """The picture after a move; each argument lies in [-1, 1]."""
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
    """Training and held-out digits: four fifths and one fifth of each class, fixed by `seed`."""
    from sklearn.datasets import load_digits as load  # slow to import, and only here

    data = load()
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


def unseen_cases(next_per_digit: int = 3, size: int = 16) -> list[Case]:
    """Every held-out count and sum, and `What comes next?` after held-out pictures of zero to eight."""
    cases = [Case("count", *count(*bounds)) for bounds in HELD_OUT_COUNTS]
    cases += [Case("sum", *add(*terms)) for terms in HELD_OUT_SUMS]
    held_out = load_digits(size)[1]
    for digit in range(9):
        for index in np.flatnonzero(held_out.labels == digit)[:next_per_digit]:
            prompt = Document([Image.fromarray(held_out.images[index]), NEXT])
            cases.append(Case("next", prompt, (WORDS[digit + 1], digit + 1)))
    return cases


class HandwritingSource:
    """Endless training documents of the weighted kinds, in one mode."""

    def __init__(self, kinds: KindWeights, mode: str, digits: Digits, augment: bool, caption_dropout: float):
        check_mode(mode)
        weights = dataclasses.asdict(kinds)
        total = sum(weights.values())
        if total <= 0:
            raise ValueError(f"data.kinds gives no kind a weight; known kinds: {', '.join(weights)}.")
        self.names = tuple(weights)
        self.thresholds = np.cumsum([w / total for w in weights.values()])
        self.mode, self.digits, self.augment = mode, digits, augment
        self.caption_dropout = caption_dropout

    def document(self, rng: np.random.Generator, index: int) -> list[Piece]:
        """One document drawn from `rng`; an endless corpus has no use for `index`."""
        chosen = int(np.searchsorted(self.thresholds, rng.random(), side="right"))
        return getattr(self, self.names[min(chosen, len(self.names) - 1)])(rng)

    def captions(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        text = "" if rng.random() < self.caption_dropout else caption(digit)
        return captioned(self._picture(digit, rng), text)

    def pairs(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        return pair(self._picture(digit, rng), caption(digit), self.mode, rng)

    def conversations(self, rng: np.random.Generator) -> list[Piece]:
        digit = int(rng.integers(10))
        return conversation([(self._picture(digit, rng), QUESTION), WORDS[digit]], template="plain")

    def documents(self, rng: np.random.Generator) -> list[Piece]:
        # A picture that is given must be seen.
        first, parts = story(rng, given=self.mode != "creation")
        drawn = [p if isinstance(p, str) else self._picture(p, rng) for p in parts]
        if isinstance(first, str):
            return interleaved([first, *drawn], self.mode)
        # The picture that a document begins with is given, as in a prompt: seen, never dreamed.
        given = Picture(self._picture(first, rng), seen=True, dreamed=False)
        return interleaved([given, NEXT, *drawn], self.mode)

    def text(self, rng: np.random.Generator) -> list[Piece]:
        return text_document(rng, self.mode)

    def _picture(self, digit: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        return self.digits.draw(digit, rng, self.augment)


def training_source(
    kinds: KindWeights,
    mode: str,
    size: int = 16,
    augment: bool = True,
    caption_dropout: float = 0.0,
) -> HandwritingSource:
    """Documents over the training digits, pictures `size` pixels wide.

    Raises:
      ValueError: an unknown mode, or no kind with a weight.
    """
    return HandwritingSource(kinds, mode, load_digits(size)[0], augment, caption_dropout)
