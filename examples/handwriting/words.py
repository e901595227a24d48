"""Numbers in words: what the demonstration counts and adds, and the text that teaches it.

Some counts and some sums occur in no training document of any kind (`HELD_OUT_*`), though every digit occurs
in every position of a count and of a sum. Pictures show digits only; text goes up to twenty, since a
language model reads about more than it will ever draw.

A story in text has the layout that it has in pictures (`WordPicture`). The language model thus knows what a
dream query has to express before the first query is trained, and can be asked for it while it is frozen.
Facts mix words and word pictures number by number, so that one rule of addition has to serve both.
"""

from __future__ import annotations

import numpy as np

from dreamllm_jax.data.pieces import Piece, interleaved
from examples.handwriting.word_pictures import WordPicture

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
WORDS = NUMBERS[:10]
QUESTION = "Which digit is this?"
NEXT = "What comes next?"

Part = str | int
Pair = tuple[int, int]

HELD_OUT_COUNTS = ((0, 4), (1, 3), (2, 6), (3, 6), (4, 5), (5, 8), (6, 8))
HELD_OUT_SUMS = ((0, 6), (1, 4), (2, 5), (3, 1), (4, 2), (5, 3), (6, 1), (7, 2))


def counts(top: int, longest: int = 6) -> tuple[Pair, ...]:
    """Returns all (first, last) up to `top` that make two to `longest` numbers."""
    return tuple((a, b) for a in range(top + 1) for b in range(a + 1, min(a + longest - 1, top) + 1))


def sums(top: int) -> tuple[Pair, ...]:
    """Returns all ordered pairs of terms whose sum is at most `top`."""
    return tuple((a, b) for a in range(top + 1) for b in range(top + 1 - a))


_DIGIT, _LARGEST = len(WORDS) - 1, len(NUMBERS) - 1
_COUNTS = {top: tuple(c for c in counts(top) if c not in HELD_OUT_COUNTS) for top in (_DIGIT, _LARGEST)}
_SUMS = {top: tuple(s for s in sums(top) if s not in HELD_OUT_SUMS) for top in (_DIGIT, _LARGEST)}
_LONG_COUNTS = tuple(c for c in counts(_LARGEST, len(NUMBERS)) if c not in HELD_OUT_COUNTS)
COUNTS, TRAINING_COUNTS = counts(_DIGIT), _COUNTS[_DIGIT]
SUMS, TRAINING_SUMS = sums(_DIGIT), _SUMS[_DIGIT]

# What text is made of, in shares.
_FACTS, _FACT_COUNTS = 0.4, 0.25  # bare facts; of these, counts (the others: sums)
_PLAIN_FACTS, _FACT_TOLD = 0.3, 0.6  # facts all in words; of the numbers of other facts, those told
_DESCRIPTIONS = 0.3  # of the rest: pairs and questions (the others: stories)
_STORY_SUMS, _STORY_COUNTS = 0.5, 0.3  # of stories, drawn ones too (the others: what comes next)
_BEYOND_DIGITS = 0.7  # of stories in text, those that may go beyond the digits
_UNSEEN = 0.3  # of told pictures, those that are not seen after they are dreamed
# Of told pictures, those with their word in the query slots, and with it in the patch slots. In a story most
# have no word: the numbers follow from the instruction, which is always present and always right.
_FACT_IN, _TOLD_IN = (0.8, 0.5), (0.5, 0.3)
# Of stories in words, those in which only the last picture has its word, and only in its query slots. It has
# to be worked out from the instruction, as in a drawn story, whose queries hold no words to copy.
_LAST_ONLY = 0.5
_STRAY_PATCH = 0.6  # of pictures told in their patches, those with a patch that says another number


def caption(digit: int) -> str:
    """Returns what a picture of `digit` is captioned with."""
    return f"a handwritten {WORDS[digit]}"


def count(first: int, last: int) -> tuple[str, tuple[Part, ...]]:
    """Returns the instruction to count, and what it asks for."""
    parts = [part for number in range(first, last + 1) for part in (NUMBERS[number], number)]
    return f"Count from {NUMBERS[first]} to {NUMBERS[last]}.", tuple(parts)


def add(a: int, b: int) -> tuple[str, tuple[Part, ...]]:
    """Returns the instruction to write a sum, and what it asks for."""
    return f"Write {NUMBERS[a]} plus {NUMBERS[b]}.", (a, "plus", b, "equals", a + b)


def story(rng: np.random.Generator, top: int = _DIGIT, given: bool = True) -> tuple[Part, tuple[Part, ...]]:
    """Returns an instruction, or the number of a first picture (if `given`), and what follows."""
    kind = rng.random()
    if kind < _STORY_SUMS:
        return add(*_pick(_SUMS[top], rng))
    if kind < _STORY_SUMS + _STORY_COUNTS or not given:
        return count(*_pick(_COUNTS[top], rng))
    number = int(rng.integers(top))
    return number, (NUMBERS[number + 1], number + 1)


def text_document(rng: np.random.Generator, mode: str) -> list[Piece]:
    """Returns what a language model reads before it has seen a picture: bare facts, and stories in words.

    `mode` says whether word pictures are seen, dreamed or both, as it does of pictures.
    """
    if rng.random() < _FACTS:
        return interleaved(_fact(rng, mode), mode)
    make = _description if rng.random() < _DESCRIPTIONS else _story_in_words
    return interleaved(make(rng, mode), mode)


def corpus_text() -> list[str]:
    """Returns every sentence of the training documents once: what the tokenizer is trained on."""
    texts = [caption(d) for d in range(10)] + [f"{QUESTION} {word}" for word in WORDS]
    texts += [f"{NEXT} {word}" for word in NUMBERS]
    for prompt, parts in [count(*c) for c in TRAINING_COUNTS] + [add(*s) for s in TRAINING_SUMS]:
        texts.append(" ".join([prompt, *(_spelled(p) for p in parts)]))
    return texts + [_counted(*c) for c in _COUNTS[_LARGEST]] + [_added(*s) for s in _SUMS[_LARGEST]]


def _fact(rng: np.random.Generator, mode: str) -> list[str | Piece]:
    """Returns a count or a sum without an instruction; each of its numbers is a word or a word picture."""
    if rng.random() < _FACT_COUNTS:
        text = _counted(*_pick(_LONG_COUNTS, rng))
    else:
        text = _added(*_pick(_SUMS[_LARGEST], rng))
    if rng.random() < _PLAIN_FACTS:
        return [text]
    return [
        _word_picture(NUMBERS.index(word), mode, rng, *_FACT_IN)
        if word in NUMBERS and rng.random() < _FACT_TOLD
        else word
        for word in text.split()
    ]


def _counted(first: int, last: int) -> str:
    return " ".join(["from", NUMBERS[first], "to", NUMBERS[last], *NUMBERS[first : last + 1]])


def _added(a: int, b: int) -> str:
    return f"{NUMBERS[a]} plus {NUMBERS[b]} equals {NUMBERS[a + b]}"


def _description(rng: np.random.Generator, mode: str) -> list[str | Piece]:
    """Returns a pair or a question, as in pictures of digits."""
    digit, kind = int(rng.integers(10)), rng.random()
    seen = WordPicture(WORDS[digit], seen=True, dreamed=False, patches=_patches(digit, rng))
    if mode == "creation" or (mode == "joint" and kind < 0.3):
        return [caption(digit), WordPicture(WORDS[digit], seen=False, dreamed=True)]
    return [seen, caption(digit)] if kind < 0.55 else [seen, QUESTION, WORDS[digit]]


def _story_in_words(rng: np.random.Generator, mode: str) -> list[str | Piece]:
    """Returns a story with a word picture in place of each picture."""
    top = _LARGEST if rng.random() < _BEYOND_DIGITS else _DIGIT
    first, parts = story(rng, top, given=mode != "creation")
    last_only = rng.random() < _LAST_ONLY
    written: list[str | Piece] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            written.append(part)
        elif last_only:
            written.append(
                _word_picture(part, mode, rng, in_query=float(i == len(parts) - 1), in_patches=0.0)
            )
        else:
            written.append(_word_picture(part, mode, rng, *_TOLD_IN))
    if isinstance(first, str):
        return [first, *written]
    given = WordPicture(NUMBERS[first], seen=True, dreamed=False, patches=_patches(first, rng))
    return [given, NEXT, *written]


def _word_picture(
    number: int, mode: str, rng: np.random.Generator, in_query: float, in_patches: float
) -> WordPicture:
    """Returns a number as a word picture; `in_query` and `in_patches` are how likely its word is there."""
    unseen, query, patches = rng.random(3) < (_UNSEEN, in_query, in_patches)
    return WordPicture(
        NUMBERS[number],
        seen=mode == "comprehension" or (mode == "joint" and not unseen),
        dreamed=mode != "comprehension",
        position=rng.random() if query else None,
        patches=_patches(number, rng) if patches else (),
    )


def _patches(number: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Returns the word of each patch. One may be wrong, so that all of them have to be read."""
    words = [NUMBERS[number]] * 4
    if rng.random() < _STRAY_PATCH:
        words[int(rng.integers(4))] = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return tuple(words)


def _spelled(part: Part) -> str:
    return NUMBERS[part] if isinstance(part, int) else part


def _pick(pairs: tuple[Pair, ...], rng: np.random.Generator) -> Pair:
    return pairs[int(rng.integers(len(pairs)))]
