"""The digits: the split, the pictures and their augmentation."""

import numpy as np
import pytest

from examples.handwriting.digits import load_digits


def test_split():
    training, held_out = load_digits(16)
    assert len(training) + len(held_out) == 1797 and abs(len(held_out) / 1797 - 0.2) < 0.005
    share = np.bincount(held_out.labels) / np.bincount(np.concatenate([training.labels, held_out.labels]))
    assert (abs(share - 0.2) < 0.01).all()
    together = np.concatenate([training.originals, held_out.originals]).reshape(1797, -1)
    original = pytest.importorskip("sklearn.datasets").load_digits().data
    np.testing.assert_array_equal(together[np.lexsort(together.T)], original[np.lexsort(original.T)])
    again = load_digits(16, seed=1)[1]
    assert len(again) == len(held_out) and (again.originals != held_out.originals).any()


def test_pictures():
    training, _ = load_digits(16)
    assert training.images.shape == (len(training), 16, 16, 3) and training.images.dtype == np.uint8
    assert (training.images[..., 0] == training.images[..., 2]).all()
    coarse = training.images[..., 0].reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert abs(coarse - training.originals * 255 / 16).mean() < 12
    assert load_digits(32)[0].images.shape[1:] == (32, 32, 3)


def test_augmentation_stays_near_and_varies():
    training, _ = load_digits(16)
    a = [training.picture(3, np.random.default_rng(i), augment=True) for i in (1, 1, 2)]
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
