"""The batch sizes in which images are drawn."""

import pytest

from dreamllm_jax.generate.images import BATCH_SIZES, batch_sizes


@pytest.mark.parametrize(
    ("pictures", "sizes"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [4]),
        (4, [4]),
        (6, [4, 1, 1]),
        (7, [4, 4]),
        (12, [16]),
        (40, [16, 16, 4, 4]),
    ],
)
def test_few_sizes_hold_any_number(pictures, sizes):
    assert batch_sizes(pictures) == sizes


def test_little_is_drawn_in_vain():
    for pictures in range(1, 200):
        sizes = batch_sizes(pictures)
        assert set(sizes) <= set(BATCH_SIZES) and sizes == sorted(sizes, reverse=True)
        assert pictures <= sum(sizes) <= pictures + sizes[-1] // 4
    assert batch_sizes(0) == []
