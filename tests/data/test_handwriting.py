"""The built-in corpus: the split, what is never shown, and the kinds of documents."""

import numpy as np
import pytest

from dreamllm_jax.config.data import KindWeights
from dreamllm_jax.data import handwriting as hw
from dreamllm_jax.data import numbers
from dreamllm_jax.data.pieces import Beside, Picture, Spelled, Text


def draw(kind, mode="joint", n=400, seed=0):
    source = hw.training_source(KindWeights(**{kind: 1.0}), mode)
    rng = np.random.default_rng(seed)
    return [source.document(rng, i) for i in range(n)]


def texts(pieces):
    return [p.text for p in pieces if isinstance(p, Text)]


def test_split():
    training, held_out = hw.load_digits(16)
    assert len(training) + len(held_out) == 1797 and abs(len(held_out) / 1797 - 0.2) < 0.005
    share = np.bincount(held_out.labels) / np.bincount(np.concatenate([training.labels, held_out.labels]))
    assert (abs(share - 0.2) < 0.01).all()
    together = np.concatenate([training.originals, held_out.originals]).reshape(1797, -1)
    original = pytest.importorskip("sklearn.datasets").load_digits().data
    np.testing.assert_array_equal(together[np.lexsort(together.T)], original[np.lexsort(original.T)])
    again = hw.load_digits(16, seed=1)[1]
    assert len(again) == len(held_out) and (again.originals != held_out.originals).any()


def test_pictures():
    training, _ = hw.load_digits(16)
    assert training.images.shape == (len(training), 16, 16, 3) and training.images.dtype == np.uint8
    assert (training.images[..., 0] == training.images[..., 2]).all()
    coarse = training.images[..., 0].reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert abs(coarse - training.originals * 255 / 16).mean() < 12
    assert hw.load_digits(32)[0].images.shape[1:] == (32, 32, 3)


def test_augmentation_stays_near_and_varies():
    training, _ = hw.load_digits(16)
    a = [training.draw(3, np.random.default_rng(i), augment=True) for i in (1, 1, 2)]
    np.testing.assert_array_equal(a[0], a[1])
    assert (a[0] != a[2]).any()
    index = int(np.flatnonzero(training.labels == 3)[0])
    clean = training.images[index, ..., 0].astype(float)
    still = training._moved(index, 0.0, 0.0, 0.0, 0.0)
    assert abs(still - clean).mean() < 8
    shifted = training._moved(index, 1.0, 0.0, 0.0, 0.0)
    columns = np.arange(16)
    moved = (shifted.mean(0) * columns).sum() / shifted.mean(0).sum() - (
        still.mean(0) * columns
    ).sum() / still.mean(0).sum()
    assert 0.3 < moved < 0.9  # 0.3 of an 8x8 pixel, to the right


def test_documents_ask_for_every_training_prompt_and_no_other():
    seen = {texts(d)[0] for d in draw("documents", n=3000)} - {numbers.NEXT}
    wanted = [numbers.count(*c) for c in numbers.TRAINING_COUNTS]
    wanted += [numbers.add(*s) for s in numbers.TRAINING_SUMS]
    assert seen == {prompt for prompt, _ in wanted}
    assert not seen & {case.prompt for case in hw.unseen_cases() if isinstance(case.prompt, str)}


def test_documents():
    for pieces in draw("documents"):
        words = texts(pieces)
        pictures = [p for p in pieces if isinstance(p, Picture)]
        if words[0].startswith("Count"):
            first, last = (numbers.WORDS.index(w) for w in words[0].strip(".").split()[2::2])
            assert words[1:] == list(numbers.WORDS[first : last + 1]) and len(pictures) == last - first + 1
            assert isinstance(pieces[1], Text) and isinstance(pieces[2], Picture)
        elif words[0].startswith("Write"):
            assert words[1:] == ["plus", "equals"] and len(pictures) == 3
            assert isinstance(pieces[1], Picture)
        else:
            assert words[0] == numbers.NEXT and words[1] in numbers.WORDS[1:] and len(pictures) == 2
            assert pictures[0] is pieces[0] and not pictures[0].dreamed
        assert all(p.seen and p.dreamed for p in pictures if p is not pieces[0])


def test_other_kinds():
    for pieces in draw("pairs", "creation", 20):
        assert texts(pieces)[0].startswith("a handwritten ") and pieces[1].dreamed and not pieces[1].seen
    for pieces in draw("conversations", n=20):
        assert isinstance(pieces[0], Picture) and pieces[0].seen and not pieces[0].dreamed
        assert texts(pieces)[0] == numbers.QUESTION and texts(pieces)[1] in numbers.WORDS
        assert [p.supervised for p in pieces[1:]] == [False, True, True]
    for pieces in draw("captions", n=20):
        assert isinstance(pieces[1], Beside)
    for pieces in draw("text", n=200):
        assert all(isinstance(piece, Text | Spelled) for piece in pieces[:-1])
    for pieces in draw("documents", "creation", 100):
        assert all(p.dreamed and not p.seen for p in pieces if isinstance(p, Picture))


def test_labels_match_pictures():
    training, _ = hw.load_digits(16)
    by_content = {
        image.tobytes(): label for image, label in zip(training.images, training.labels, strict=True)
    }
    source = hw.training_source(KindWeights(pairs=1.0), "comprehension", augment=False)
    for i in range(50):
        picture, text, _ = source.document(np.random.default_rng(i), i)
        assert numbers.WORDS[by_content[picture.image.tobytes()]] == text.text.split()[-1]


def test_caption_dropout():
    source = hw.training_source(KindWeights(captions=1.0), "creation", caption_dropout=0.3)
    rng = np.random.default_rng(0)
    empty = sum(texts(source.document(rng, i)) == [""] for i in range(500))
    assert 110 < empty < 190


def test_unseen_cases():
    cases = {str(c.prompt): c for c in hw.unseen_cases()}
    assert cases["Count from one to three."].expected == ("one", 1, "two", 2, "three", 3)
    assert cases["Write two plus five."].expected == (2, "plus", 5, "equals", 7)
    following = [c for c in hw.unseen_cases(2) if c.kind == "next"]
    assert len(following) == 18 and following[0].expected == ("one", 1)
    assert following[0].prompt.images[0].size == (16, 16) and following[0].prompt.text == numbers.NEXT
