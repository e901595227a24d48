"""The judge, the verdict on a document, and the measures of diversity and of copying."""

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.document import Document
from examples.handwriting.cases import Case
from examples.handwriting.judge import (
    Creation,
    Judge,
    as_originals,
    creation_scores,
    distances,
    mark,
    mean_distance,
)


@pytest.fixture(scope="module")
def judge():
    return Judge(16)


def test_pictures_come_back_as_their_originals(judge):
    digits = judge.held_out
    back = as_originals(digits.images)
    assert back.min() >= 0 and back.max() <= 16
    assert np.abs(back - digits.originals).mean() < 1
    gray = np.zeros((1, 24, 24, 3), np.uint8)
    gray[:, :3, :3] = 255
    assert as_originals(gray)[0, 0, 0] == pytest.approx(16) and as_originals(gray).sum() == pytest.approx(16)
    with pytest.raises(ValueError, match="20 pixels wide"):
        as_originals(np.zeros((1, 20, 20, 3), np.uint8))


def test_the_judge_is_good_and_has_not_seen_what_it_is_tested_on(judge):
    assert judge.accuracy >= 0.97
    assert (judge(judge.held_out.images) == judge.held_out.labels).mean() >= 0.97
    assert len(judge.training) + len(judge.held_out) == 1797
    known = {image.tobytes() for image in judge.training.originals}
    assert sum(image.tobytes() in known for image in judge.held_out.originals) == 0


def test_a_document_is_right_only_if_everything_is(judge):
    def picture(digit):
        return Image.fromarray(judge.held_out.images[judge.held_out.labels == digit][0])

    case = Case("sum", "Write two plus five.", (2, "plus", 5, "equals", 7))
    right = [picture(2), "plus", picture(5), "equals", picture(7)]
    written = mark(case, Document(right, "stop"), judge)
    assert written.right and written.judged == case.expected
    wrong = [
        Document(right, "length"),  # it did not end
        Document([*right, "equals"], "stop"),
        Document(right[:-1], "stop"),
        Document([picture(2), "plus", picture(5), "equals", picture(1)], "stop"),
        Document(["two", "plus", picture(5), "equals", picture(7)], "stop"),
        Document([picture(2), picture(5), "plus", "equals", picture(7)], "stop"),
        Document([], "stop"),
    ]
    assert not any(mark(case, document, judge).right for document in wrong)


def creation_of(pictures, judge):
    judged = judge(pictures.reshape(-1, 16, 16, 3)).reshape(pictures.shape[:2])
    return Creation(pictures, judged)


def test_unseen_real_digits_score_as_real_ones(judge):
    digits = judge.held_out
    pictures = np.stack([digits.images[digits.labels == d][:20] for d in range(10)])
    scores = creation_scores(creation_of(pictures, judge), judge.training, digits)
    assert scores["creation_accuracy"] >= 0.97
    assert 0.85 < scores["creation_diversity"] < 1.15
    assert scores["creation_diversity_min"] <= scores["creation_diversity"]
    assert 0.85 < scores["creation_novelty"] < 1.15
    assert scores["creation_copied"] < 0.05


def test_a_memory_and_a_single_face_are_found_out(judge):
    digits = judge.training
    copies = np.stack([digits.images[digits.labels == d][:20] for d in range(10)])
    scores = creation_scores(creation_of(copies, judge), digits, judge.held_out)
    assert scores["creation_novelty"] == pytest.approx(0, abs=1e-3) and scores["creation_copied"] == 1
    faces = np.repeat(copies[:, :1], 20, axis=1)
    scores = creation_scores(creation_of(faces, judge), digits, judge.held_out)
    assert scores["creation_accuracy"] >= 0.9
    assert scores["creation_diversity"] == pytest.approx(0, abs=1e-3)


def test_distances():
    a = np.zeros((2, 8, 8))
    a[1, 0, 0] = 3
    b = np.zeros((1, 8, 8))
    b[0, 0, 1] = 4
    np.testing.assert_allclose(distances(a, b), [[4], [5]])
    assert mean_distance(np.concatenate([a, b])) == pytest.approx((3 + 4 + 5) / 3)
