"""The data of a stage: a source by name, or sources that are files."""

import pytest

from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.data import DataConfig, SourceConfig

PAIRS = SourceConfig("pairs", "x.tar")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SourceConfig("pairs", "x.tar", weight=0.0), "'x.tar' has weight 0.0; it must be positive"),
        (lambda: SourceConfig("pear", "x.tar"), "Unknown format 'pear'; known: pairs; for one of your own"),
        (lambda: DataConfig(source="a.b:C", sources=(PAIRS,)), "give one of the two"),
        (lambda: DataConfig(source="digits"), "Unknown source 'digits'; none is built in, write package.mod"),
        (lambda: DataConfig(source_options={"a": 1}), "source_options are the options of source, which is"),
        (lambda: DataConfig(length=1), "data.length is 1; it must be at least 2"),
        (lambda: DataConfig(batch_size=0), "data.batch_size is 0; it must be at least 1"),
        (lambda: DataConfig(prefetch=-1), "data.prefetch is -1; it must be at least 0"),
        (lambda: build(DataConfig, {"source_options": 3}), "source_options: got 3; expected a mapping"),
    ],
)
def test_impossible_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_possible_ones():
    assert DataConfig(sources=(PAIRS,)).sources[0].options == {}
    assert DataConfig(source="a.b:C", source_options={"kinds": {"text": 1.0}}).prefetch == 2
    config = build(DataConfig, {"sources": [{"format": "a.b:C", "path": "x", "options": {"deep": {"n": 1}}}]})
    assert build(DataConfig, to_dict(config)) == config and hash(config) == hash(build(DataConfig, config))
