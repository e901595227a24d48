"""The documents that the demonstration trains on: their kinds, and what they never contain."""

import numpy as np
import pytest

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.data.pieces import Picture, Text, UnslottedImage
from dreamllm_jax.data.sources import check_source, open_documents
from examples.handwriting import words
from examples.handwriting.cases import unseen_cases
from examples.handwriting.digits import load_digits
from examples.handwriting.word_pictures import WordPicture
from tests.data.fakes import WordTokenizer

SOURCE = "examples.handwriting.source:Handwriting"


def open_source(mode, kinds, **options):
    """The source as a recipe opens it."""
    config = dict(source=SOURCE, source_options=dict(kinds=kinds, **options), mode=mode)
    return open_documents(build(DataConfig, config), 16, WordTokenizer())


def documents(kind, mode="joint", n=400, seed=0):
    source = open_source(mode, {kind: 1.0})
    rng = np.random.default_rng(seed)
    return [source.document(rng, i) for i in range(n)]


def texts(pieces):
    return [p.text for p in pieces if isinstance(p, Text)]


def test_documents_ask_for_every_training_prompt_and_no_other():
    seen = {texts(d)[0] for d in documents("documents", n=3000)} - {words.NEXT}
    wanted = [words.count(*c) for c in words.TRAINING_COUNTS]
    wanted += [words.add(*s) for s in words.TRAINING_SUMS]
    assert seen == {prompt for prompt, _ in wanted}
    assert not seen & {case.prompt for case in unseen_cases() if isinstance(case.prompt, str)}


def test_documents():
    for pieces in documents("documents"):
        parts = texts(pieces)
        pictures = [p for p in pieces if isinstance(p, Picture)]
        if parts[0].startswith("Count"):
            first, last = (words.WORDS.index(w) for w in parts[0].strip(".").split()[2::2])
            assert parts[1:] == list(words.WORDS[first : last + 1]) and len(pictures) == last - first + 1
            assert isinstance(pieces[1], Text) and isinstance(pieces[2], Picture)
        elif parts[0].startswith("Write"):
            assert parts[1:] == ["plus", "equals"] and len(pictures) == 3
            assert isinstance(pieces[1], Picture)
        else:
            assert parts[0] == words.NEXT and parts[1] in words.WORDS[1:] and len(pictures) == 2
            assert pictures[0] is pieces[0] and not pictures[0].dreamed
        assert all(p.seen and p.dreamed for p in pictures if p is not pieces[0])


def test_other_kinds():
    for pieces in documents("pairs", "creation", 20):
        assert texts(pieces)[0].startswith("a handwritten ") and pieces[1].dreamed and not pieces[1].seen
    for pieces in documents("conversations", n=20):
        assert isinstance(pieces[0], Picture) and pieces[0].seen and not pieces[0].dreamed
        assert texts(pieces)[0] == words.QUESTION and texts(pieces)[1] in words.WORDS
        assert [p.supervised for p in pieces[1:]] == [False, True, True]
    for pieces in documents("captions", n=20):
        assert isinstance(pieces[1], UnslottedImage)
    for pieces in documents("text", n=200):
        assert all(isinstance(piece, Text | WordPicture) for piece in pieces[:-1])
    for pieces in documents("documents", "creation", 100):
        assert all(p.dreamed and not p.seen for p in pieces if isinstance(p, Picture))


def test_labels_match_pictures():
    training, _ = load_digits(16)
    by_content = {
        image.tobytes(): label for image, label in zip(training.images, training.labels, strict=True)
    }
    source = open_source("comprehension", {"pairs": 1.0}, augment=False)
    for i in range(50):
        picture, text, _ = source.document(np.random.default_rng(i), i)
        assert words.WORDS[by_content[picture.image.tobytes()]] == text.text.split()[-1]


def test_caption_dropout():
    source = open_source("creation", {"captions": 1.0}, caption_dropout=0.3)
    rng = np.random.default_rng(0)
    empty = sum(texts(source.document(rng, i)) == [""] for i in range(500))
    assert 110 < empty < 190


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "data.source_options: key 'kinds' is missing"),
        (
            {"kinds": {}},
            "data.source_options.kinds: no kind has a weight; give one to some of captions",
        ),
        ({"kinds": {"pair": 1.0}}, "data.source_options.kinds: unknown key 'pair'. Did you mean 'pairs'"),
        ({"kinds": {"text": -1.0}}, "kinds: text is -1.0; a weight cannot be negative"),
        ({"kinds": {"text": 1.0}, "caption_dropout": 2.0}, "caption_dropout is 2.0; it must lie in"),
    ],
)
def test_impossible_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_source(build(DataConfig, {"source": SOURCE, "source_options": options}), WordTokenizer())
