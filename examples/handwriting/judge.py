"""What a model of the handwriting recipe can do, in numbers, judged by a classifier that it never met.

The judge is a support vector machine over the 8x8 originals of the *training* pictures; whatever is
judged is first averaged down to their size. Distances between pictures are taken in that space.
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
# A picture nearer to a training picture than all but this share of real, unseen digits are, counts as copied.
COPY_QUANTILE = 0.01


def as_originals(pictures: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n 8 8"]:
    """Pictures in the form of the 8x8 originals: gray, averaged down, 0 to 16.

    Raises:
      ValueError: a size that 8 does not divide.
    """
    size = pictures.shape[1]
    if size % 8:
        raise ValueError(f"Pictures are {size} pixels wide; the evaluation needs a multiple of 8.")
    cells = pictures.astype(np.float64).mean(-1).reshape(-1, 8, size // 8, 8, size // 8)
    return cells.mean((2, 4)) * (16 / 255)


class Judge:
    """Tells digits apart, independently of the model; `accuracy` is its own, on held-out pictures."""

    def __init__(self, size: int):
        """Trains on the training originals; `size` is that of the pictures it will see."""
        self.training, self.held_out = load_digits(size)
        self._machine = SVC(gamma=0.001).fit(_rows(self.training.originals), self.training.labels)
        guesses = self._machine.predict(_rows(self.held_out.originals))
        self.accuracy = float((guesses == self.held_out.labels).mean())

    def __call__(self, pictures: UInt8[np.ndarray, "n s s 3"]) -> Int[np.ndarray, " n"]:
        """The digit in each picture."""
        return self._machine.predict(_rows(as_originals(pictures)))


@dataclasses.dataclass(frozen=True, eq=False)
class Creation:
    """Pictures drawn of each digit, and what the judge reads in them."""

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
    """A document that the model wrote for a case, what the judge reads in its pictures, and the verdict."""

    case: Case
    document: Document
    judged: tuple[Part, ...]
    right: bool


def create(model: DreamLLM, judge: Judge, per_digit: int = 20, seed: int = 0) -> Creation:
    """StepNoise `per_digit` pictures from the caption of each digit."""
    prompts = [caption(digit) for digit in range(10)]
    drawn = model.generate_images(prompts, num_images_per_prompt=per_digit, seed=seed)
    pictures = np.array([[np.asarray(p) for p in row] for row in drawn])
    judged = judge(pictures.reshape(-1, *pictures.shape[2:])).reshape(10, per_digit)
    return Creation(pictures, judged)


def comprehend(model: DreamLLM, digits: Digits) -> Comprehension:
    """Asks about every picture, all in one batch."""
    prompts = [Document([Image.fromarray(picture), QUESTION]) for picture in digits.images]
    return Comprehension(digits, tuple(model.generate_text(prompts, max_new_tokens=ANSWER_TOKENS)))


def write(model: DreamLLM, judge: Judge, seeds: int = 3) -> list[Written]:
    """Has every unseen case written: counts and sums `seeds` times each, continuations once."""
    cases = unseen_cases(size=model.config.image_size)
    repeated = [(case, s) for case in cases for s in range(1 if case.kind == "next" else seeds)]
    documents = model.generate_document([c.prompt for c, _ in repeated], seed=[s for _, s in repeated])
    return [mark(case, document, judge) for (case, _), document in zip(repeated, documents, strict=True)]


def mark(case: Case, document: Document, judge: Judge) -> Written:
    """Right is a document of exactly the expected parts, ended by the model itself."""
    judged = tuple(
        part.strip() if isinstance(part, str) else int(judge(np.asarray(part.convert("RGB"))[None])[0])
        for part in document
    )
    return Written(case, document, judged, judged == case.expected and document.finish_reason == "stop")


def creation_scores(creation: Creation, training: Digits, held_out: Digits) -> dict[str, float]:
    """How many pictures are right, how much those of a digit differ, and how near training pictures they are.

    Diversity of a digit: the mean distance between two of its pictures, against that of two real ones;
    1 is that of real handwriting. Novelty: the median distance to the nearest training picture, against
    that of real, unseen digits; 0 is a memory of the training pictures.
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
    """Shares of right documents: of unseen counts and sums together, and of each kind."""
    scores = {"document_accuracy": _share([w for w in written if w.case.kind in ("count", "sum")])}
    for kind in ("count", "sum", "next"):
        scores[f"document_accuracy_{kind}"] = _share([w for w in written if w.case.kind == kind])
    return scores


def distances(a: Float[np.ndarray, "n 8 8"], b: Float[np.ndarray, "m 8 8"]) -> Float[np.ndarray, "n m"]:
    """Euclidean distances between all pictures of `a` and all of `b`."""
    a, b = _rows(a), _rows(b)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def mean_distance(pictures: Float[np.ndarray, "n 8 8"]) -> float:
    """The mean over all pairs of different pictures."""
    n = len(pictures)
    return float(distances(pictures, pictures)[~np.eye(n, dtype=bool)].mean())


def _rows(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1)


def _share(written: Sequence[Written]) -> float:
    return sum(w.right for w in written) / len(written)
