"""The data of a stage: sources that are files, and the built-in one."""

import pytest

from dreamllm_jax.config.data import DataConfig, KindWeights, SourceConfig

PAIRS = SourceConfig("pairs", "x.tar")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KindWeights(pairs=-0.1), "data.kinds.pairs is -0.1; a weight cannot be negative"),
        (lambda: SourceConfig("pairs", "x.tar", weight=0.0), "'x.tar' has weight 0.0; it must be positive"),
        (lambda: SourceConfig("interleaved", "x.jsonl"), r"\(interleaved\) needs images"),
        (lambda: SourceConfig("instructions", "x.jsonl"), r"\(instructions\) needs images"),
        (lambda: SourceConfig("pairs", "x.tar", images="y"), "has its pictures inside; leave images out"),
        (lambda: SourceConfig("conversations", "x.json", caption_key="c"), "caption_key is for pairs"),
        (lambda: SourceConfig("pairs", "x.tar", min_similarity=0.2), "min_similarity is for interleaved"),
        (lambda: DataConfig(source="handwriting", sources=(PAIRS,)), "give one of the two"),
        (lambda: DataConfig(length=1), "data.length is 1; it must be at least 2"),
        (lambda: DataConfig(prefetch=-1), "data.prefetch is -1; it must be at least 0"),
        (lambda: DataConfig(caption_dropout=1.5), "data.caption_dropout is 1.5; it must lie in"),
    ],
)
def test_impossible_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_possible_ones():
    assert DataConfig(sources=(PAIRS,)).sources[0].template == "vicuna_v1.1"
    assert DataConfig(source="handwriting", kinds=KindWeights(text=1.0)).prefetch == 2
    SourceConfig("conversations", "x.json")  # LLaVA's may be of text alone
