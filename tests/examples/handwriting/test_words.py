"""Counts and sums: which are held out, and the text that teaches them."""

import re

import numpy as np
import pytest

from dreamllm_jax.data.pieces import Text
from dreamllm_jax.data.tokenizer import train_tokenizer
from examples.handwriting import words
from examples.handwriting.word_pictures import WordPicture
from examples.handwriting.words import HELD_OUT_COUNTS, HELD_OUT_SUMS, NUMBERS, TRAINING_COUNTS, TRAINING_SUMS


def documents(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    return [words.text_document(rng, "joint") for _ in range(n)]


def text_of(pieces):
    """A document as one string, pictures as their words."""
    parts = [p.text if isinstance(p, Text) else p.word for p in pieces if isinstance(p, Text | WordPicture)]
    return " ".join(parts)


def test_training_has_every_digit_in_every_position():
    positions = {(i, a + i) for a, b in words.COUNTS for i in range(b - a + 1)}
    kept = {(i, a + i) for a, b in TRAINING_COUNTS for i in range(b - a + 1)}
    assert kept == positions
    assert {b for _, b in TRAINING_COUNTS} == set(range(1, 10))
    assert {b - a + 1 for a, b in TRAINING_COUNTS} == set(range(2, 7))
    for term in (0, 1):
        assert {s[term] for s in TRAINING_SUMS} == set(range(10))
    assert {a + b for a, b in TRAINING_SUMS} == set(range(10))
    assert all((b, a) in TRAINING_SUMS for a, b in HELD_OUT_SUMS)
    assert set(HELD_OUT_SUMS) < set(words.SUMS) and set(HELD_OUT_COUNTS) < set(words.COUNTS)


def test_held_out_prompts_occur_in_no_text():
    everything = [text_of(d) for d in documents()] + words.corpus_text()
    for a, b in HELD_OUT_SUMS:
        pattern = re.compile(rf"\b{NUMBERS[a]} plus {NUMBERS[b]}\b")
        assert not any(pattern.search(text) for text in everything), (a, b)
    for a, b in HELD_OUT_COUNTS:
        pattern = re.compile(rf"\bfrom {NUMBERS[a]} to {NUMBERS[b]}\b")
        assert not any(pattern.search(text) for text in everything), (a, b)


def test_text_is_right_and_reaches_twenty():
    value = {word: i for i, word in enumerate(NUMBERS)}
    sums = counts = 0
    for text in map(text_of, documents()):
        if match := re.search(r"(\w+) plus (\w+) equals (\w+)$", text):
            assert value[match[1]] + value[match[2]] == value[match[3]], text
            sums += 1
        if match := re.match(r"from (\w+) to (\w+) (.*)", text):
            first, last = value[match[1]], value[match[2]]
            assert match[3].split() == list(NUMBERS[first : last + 1]), text
            counts += 1
    assert sums > 1000 and counts > 300
    together = " ".join(map(text_of, documents()))
    assert all(word in together for word in NUMBERS)


def test_a_story_in_word_pictures_has_the_layout_of_one_in_pictures():
    stories = [d for d in documents() if isinstance(d[0], Text) and d[0].text.startswith("Write")]
    for pieces in stories:
        *_, first, plus, second, equals, result, _ = pieces
        assert (plus, equals) == (Text("plus"), Text("equals"))
        assert all(isinstance(p, WordPicture) and p.dreamed for p in (first, second, result))
        assert pieces[0].text == f"Write {first.word} plus {second.word}."


def test_many_sums_are_to_be_worked_out_from_their_instruction():
    """Only the last picture has its word, in its query slots: no earlier one says what is added."""
    sums = last_only = 0
    for pieces in documents():
        pictures = [p for p in pieces if isinstance(p, WordPicture)]
        if isinstance(pieces[0], Text) and pieces[0].text.startswith("Write"):
            sums += 1
            hidden = not any(p.patches for p in pictures) and all(p.position is None for p in pictures[:-1])
            last_only += hidden and pictures[-1].position is not None
    assert sums > 500 and last_only > 0.45 * sums


def test_facts_mix_words_and_word_pictures():
    """Each number of a sum is a word in some facts and a word picture in others, independently."""
    facts = [
        d for d in documents() if (isinstance(d[0], WordPicture) or d[0].text in NUMBERS) and len(d) == 6
    ]
    kinds = {tuple(isinstance(d[i], WordPicture) for i in (0, 2, 4)) for d in facts if d[1] == Text("plus")}
    assert len(kinds) == 8


@pytest.mark.parametrize("mode", ["comprehension", "creation", "joint"])
def test_word_pictures_follow_the_mode(mode):
    rng = np.random.default_rng(0)
    pieces = [p for _ in range(2000) for p in words.text_document(rng, mode) if isinstance(p, WordPicture)]
    ways = {(p.seen, p.dreamed) for p in pieces}
    seen, dreamed, both = (True, False), (False, True), (True, True)
    assert ways == {"comprehension": {seen}, "creation": {dreamed}, "joint": {seen, dreamed, both}}[mode]
    assert any(p.position is None for p in pieces) and any(p.position is not None for p in pieces)
    assert any(not p.patches for p in pieces) and any(p.patches for p in pieces)


def test_most_patches_of_a_word_picture_are_right():
    pieces = [p for d in documents() for p in d if isinstance(p, WordPicture) and p.patches]
    right = [sum(word == p.word for word in p.patches) for p in pieces]
    assert all(len(p.patches) == 4 for p in pieces) and set(right) == {3, 4}
    assert 0.3 < np.mean(np.array(right) == 4) < 0.6


@pytest.mark.parametrize("top", [9, 20])
def test_counts_and_sums(top):
    assert len(words.sums(top)) == (top + 1) * (top + 2) // 2
    assert all(1 <= b - a <= 5 and b <= top for a, b in words.counts(top))


def test_a_number_is_one_token():
    """The query slots of a word picture then have room for it."""
    tokenizer = train_tokenizer(words.corpus_text(), 512)
    assert all(len(tokenizer.encode(word)) == 1 for word in NUMBERS)
