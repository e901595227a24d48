"""What is counted and added: the split, and the text that has_targets it."""

import re

import numpy as np
import pytest

from dreamllm_jax.data import numbers
from dreamllm_jax.data.numbers import HELD_OUT_COUNTS, HELD_OUT_SUMS, NUMBERS, TRAINING_COUNTS, TRAINING_SUMS
from dreamllm_jax.data.pieces import Spelled, Text
from dreamllm_jax.data.tokenizer import train_tokenizer


def documents(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    return [numbers.text_document(rng, "joint") for _ in range(n)]


def words(pieces):
    """A document as one string, pictures as their words."""
    parts = [p.text if isinstance(p, Text) else p.word for p in pieces if isinstance(p, Text | Spelled)]
    return " ".join(parts)


def test_every_digit_stays_at_every_place():
    places = {(i, a + i) for a, b in numbers.COUNTS for i in range(b - a + 1)}
    kept = {(i, a + i) for a, b in TRAINING_COUNTS for i in range(b - a + 1)}
    assert kept == places
    assert {b for _, b in TRAINING_COUNTS} == set(range(1, 10))
    assert {b - a + 1 for a, b in TRAINING_COUNTS} == set(range(2, 7))
    for place in (0, 1):
        assert {s[place] for s in TRAINING_SUMS} == set(range(10))
    assert {a + b for a, b in TRAINING_SUMS} == set(range(10))
    assert all((b, a) in TRAINING_SUMS for a, b in HELD_OUT_SUMS)
    assert set(HELD_OUT_SUMS) < set(numbers.SUMS) and set(HELD_OUT_COUNTS) < set(numbers.COUNTS)


def test_what_is_held_out_occurs_in_no_text():
    everything = [words(d) for d in documents()] + numbers.corpus_text()
    for a, b in HELD_OUT_SUMS:
        pattern = re.compile(rf"\b{NUMBERS[a]} plus {NUMBERS[b]}\b")
        assert not any(pattern.search(text) for text in everything), (a, b)
    for a, b in HELD_OUT_COUNTS:
        pattern = re.compile(rf"\bfrom {NUMBERS[a]} to {NUMBERS[b]}\b")
        assert not any(pattern.search(text) for text in everything), (a, b)


def test_text_is_right_and_reaches_twenty():
    value = {word: i for i, word in enumerate(NUMBERS)}
    sums = counts = 0
    for text in map(words, documents()):
        if match := re.search(r"(\w+) plus (\w+) equals (\w+)$", text):
            assert value[match[1]] + value[match[2]] == value[match[3]], text
            sums += 1
        if match := re.match(r"from (\w+) to (\w+) (.*)", text):
            first, last = value[match[1]], value[match[2]]
            assert match[3].split() == list(NUMBERS[first : last + 1]), text
            counts += 1
    assert sums > 1000 and counts > 300
    together = " ".join(map(words, documents()))
    assert all(word in together for word in NUMBERS)


def test_a_told_story_has_the_layout_of_a_drawn_one():
    told = [d for d in documents() if isinstance(d[0], Text) and d[0].text.startswith("Write")]
    for pieces in told:
        *_, first, plus, second, equals, result, _ = pieces
        assert (plus, equals) == (Text("plus"), Text("equals"))
        assert all(isinstance(p, Spelled) and p.dreamed for p in (first, second, result))
        assert pieces[0].text == f"Write {first.word} plus {second.word}."


def test_facts_mix_words_and_told_pictures():
    """Every number of a sum is written in some facts and told in others, independently."""
    facts = [d for d in documents() if (isinstance(d[0], Spelled) or d[0].text in NUMBERS) and len(d) == 6]
    kinds = {tuple(isinstance(d[i], Spelled) for i in (0, 2, 4)) for d in facts if d[1] == Text("plus")}
    assert len(kinds) == 8


@pytest.mark.parametrize("mode", ["comprehension", "creation", "joint"])
def test_told_pictures_follow_the_mode(mode):
    rng = np.random.default_rng(0)
    pieces = [p for _ in range(2000) for p in numbers.text_document(rng, mode) if isinstance(p, Spelled)]
    ways = {(p.seen, p.dreamed) for p in pieces}
    seen, dreamed, both = (True, False), (False, True), (True, True)
    assert ways == {"comprehension": {seen}, "creation": {dreamed}, "joint": {seen, dreamed, both}}[mode]
    assert any(p.place is None for p in pieces) and any(p.place is not None for p in pieces)
    assert any(not p.patches for p in pieces) and any(p.patches for p in pieces)


def test_most_patches_of_a_told_picture_are_right():
    pieces = [p for d in documents() for p in d if isinstance(p, Spelled) and p.patches]
    right = [sum(word == p.word for word in p.patches) for p in pieces]
    assert all(len(p.patches) == 4 for p in pieces) and set(right) == {3, 4}
    assert 0.3 < np.mean(np.array(right) == 4) < 0.6


@pytest.mark.parametrize("top", [9, 20])
def test_counts_and_sums(top):
    assert len(numbers.sums(top)) == (top + 1) * (top + 2) // 2
    assert all(1 <= b - a <= 5 and b <= top for a, b in numbers.counts(top))


def test_a_number_is_one_token():
    """A spelled picture has room for one word in its query slots."""
    tokenizer = train_tokenizer(numbers.corpus_text(), 512)
    assert all(len(tokenizer.encode(word)) == 1 for word in NUMBERS)
