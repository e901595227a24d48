"""Scores of a model of the handwriting recipe, by a classifier that is independent of the model.

The judge is a support vector machine trained on the 8x8 originals of the training pictures. Pictures to judge
are first averaged down to that size. Distances between pictures are taken at that size, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from sklearn.svm import SVC

from dreamllm_jax.document import Document
from dreamllm_jax.generate.api import DreamLLM
from examples.handwriting.cases import Case, unseen_cases
from examples.handwriting.digits import Digits, load_digits
from examples.handwriting.words import QUESTION, WORDS, Part, caption

ANSWER_TOKENS = 8
# A picture counts as copied if it is nearer to a training picture than all but this share of held-out ones.
COPY_QUANTILE = 0.01


def as_originals(pictures: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n 8 8"]:
    """Pictures as the 8x8 originals are: gray, averaged down, values from 0 to 16.

    Raises:
      ValueError: the size is not a multiple of 8.
    """
    size = pictures.shape[1]
    if size % 8:
        raise ValueError(f"Pictures are {size} pixels wide; the evaluation needs a multiple of 8.")
    cells = pictures.astype(np.float64).mean(-1).reshape(-1, 8, size // 8, 8, size // 8)
    return cells.mean((2, 4)) * (16 / 255)


class Judge:
    """A classifier of digits; `accuracy` is its own, on the held-out pictures."""

    def __init__(self, size: int):
        """Trains on the training originals; `size` is that of the pictures to judge, in pixels."""
        self.training, self.held_out = load_digits(size)
        self._machine = SVC(gamma=0.001)  # pyright: ignore[reportArgumentType]: the stub wants a word
        self._machine.fit(_rows(self.training.originals), self.training.labels)
        guesses = self._machine.predict(_rows(self.held_out.originals))
        self.accuracy = float((guesses == self.held_out.labels).mean())

    def __call__(self, pictures: UInt8[np.ndarray, "n s s 3"]) -> Int[np.ndarray, " n"]:
        """Returns the digit in each picture."""
        return self._machine.predict(_rows(as_originals(pictures)))


@dataclasses.dataclass(frozen=True, eq=False)
class Creation:
    """The pictures that the model drew of each digit, and the judge's reading of them."""

    pictures: UInt8[np.ndarray, "10 n s s 3"]
    judged: Int[np.ndarray, "10 n"]

    @property
    def right(self) -> np.ndarray:
        """bool [10, n]."""
        return self.judged == np.arange(10)[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Comprehension:
    """The answers to `Which digit is this?` about every held-out picture."""

    digits: Digits
    answers: tuple[str, ...]

    @property
    def right(self) -> np.ndarray:
        """bool [n]."""
        wanted = np.array([WORDS[label] for label in self.digits.labels])
        return np.array(self.answers) == wanted


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A document that the model wrote for a case, its parts as the judge reads them, and the verdict."""

    case: Case
    document: Document
    judged: tuple[Part, ...]
    right: bool


def create(model: DreamLLM, judge: Judge, per_digit: int = 20, seed: int = 0) -> Creation:
    """Draws `per_digit` pictures from the caption of each digit."""
    prompts = [caption(digit) for digit in range(10)]
    drawn = model.generate_images(prompts, num_images_per_prompt=per_digit, seed=seed)
    pictures = np.array([[np.asarray(p) for p in row] for row in drawn])
    judged = judge(pictures.reshape(-1, *pictures.shape[2:])).reshape(10, per_digit)
    return Creation(pictures, judged)


def comprehend(model: DreamLLM, digits: Digits) -> Comprehension:
    """Asks about every picture, in one batch."""
    prompts = [Document([Image.fromarray(picture), QUESTION]) for picture in digits.images]
    return Comprehension(digits, tuple(model.generate_text(prompts, max_new_tokens=ANSWER_TOKENS)))


def write(model: DreamLLM, judge: Judge, seeds: int = 3) -> list[Written]:
    """Writes a document for every unseen case; for a count or a sum, one with each of `seeds` seeds."""
    cases = unseen_cases(size=model.config.image_size)
    repeated = [(case, s) for case in cases for s in range(1 if case.kind == "next" else seeds)]
    documents = model.generate_document([c.prompt for c, _ in repeated], seed=[s for _, s in repeated])
    return [mark(case, document, judge) for (case, _), document in zip(repeated, documents, strict=True)]


def mark(case: Case, document: Document, judge: Judge) -> Written:
    """Judges a document: it is right if it has exactly the expected parts, and the model ended it."""
    judged = tuple(
        part.strip() if isinstance(part, str) else int(judge(np.asarray(part.convert("RGB"))[None])[0])
        for part in document
    )
    return Written(case, document, judged, judged == case.expected and document.finish_reason == "stop")


def creation_scores(creation: Creation, training: Digits, held_out: Digits) -> dict[str, float]:
    """Scores of drawn pictures: how many are right, how diverse they are, and how far from training pictures.

    Diversity of a digit is the mean distance between two of its drawings, divided by that between two real
    pictures of it: 1 is as diverse as real handwriting. Novelty is the median distance of a drawing to the
    nearest training picture, divided by that of held-out pictures: 0 means copies of training pictures.
    """
    drawn = [as_originals(pictures) for pictures in creation.pictures]
    real = as_originals(training.images)
    diversity = [
        mean_distance(drawn[digit]) / mean_distance(real[training.labels == digit]) for digit in range(10)
    ]
    nearest = distances(np.concatenate(drawn), real).min(1)
    usual = distances(as_originals(held_out.images), real).min(1)
    return {
        "creation_accuracy": float(creation.right.mean()),
        "creation_diversity": float(np.mean(diversity)),
        "creation_diversity_min": float(min(diversity)),
        "creation_novelty": float(np.median(nearest) / np.median(usual)),
        "creation_copied": float((nearest < np.quantile(usual, COPY_QUANTILE)).mean()),
    }


def document_scores(written: Sequence[Written]) -> dict[str, float]:
    """Returns the shares of right documents: of unseen counts and sums together, and of each kind."""
    scores = {"document_accuracy": _share([w for w in written if w.case.kind in ("count", "sum")])}
    for kind in ("count", "sum", "next"):
        scores[f"document_accuracy_{kind}"] = _share([w for w in written if w.case.kind == kind])
    return scores


def distances(a: Float[np.ndarray, "n 8 8"], b: Float[np.ndarray, "m 8 8"]) -> Float[np.ndarray, "n m"]:
    """Returns the Euclidean distances between each picture of `a` and each of `b`."""
    a, b = _rows(a), _rows(b)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def mean_distance(pictures: Float[np.ndarray, "n 8 8"]) -> float:
    """Returns the mean distance over all pairs of different pictures."""
    n = len(pictures)
    return float(distances(pictures, pictures)[~np.eye(n, dtype=bool)].mean())


def _rows(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1)


def _share(written: Sequence[Written]) -> float:
    return sum(w.right for w in written) / len(written)
