"""Batches: exact resuming, independence of hosts and threads, counted losses."""

import dataclasses
import json
from contextlib import closing

import numpy as np
import pytest

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipVisionConfig, LlamaConfig
from dreamllm_jax.data.packing import RowLayout
from dreamllm_jax.data.pieces import Picture, interleaved
from dreamllm_jax.data.pipeline import BatchStream, batches, merge_iterator_states
from dreamllm_jax.data.sources import SourceContext
from dreamllm_jax.data.tokenizer import train_tokenizer
from examples.handwriting.source import Handwriting, HandwritingOptions, KindWeights
from examples.handwriting.words import corpus_text
from tests.data.fakes import WordTokenizer

LAYOUT = RowLayout(96, 4, 3, max_images=5, max_dreams=5, image_size=16, dream_size=16, null_dream=True)
SOURCE = "examples.handwriting.source:Handwriting"
KINDS = KindWeights(pairs=1.0, conversations=1.0, documents=2.0, text=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus_text(), 400)


@pytest.fixture
def stream(tokenizer):
    opened = []

    def make(**options):
        source = Handwriting(HandwritingOptions(KINDS), SourceContext("joint", 16, tokenizer))
        opened.append(BatchStream(source, tokenizer, LAYOUT, **{"batch_size": 4, "seed": 1, **options}))
        return opened[-1]

    yield make
    for s in opened:
        s.close()


def assert_same(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_resuming_is_exact(stream):
    first = stream()
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 2000
    expected = [next(first) for _ in range(4)]
    again = stream()
    next(again)
    again.load_state(state)
    for batch in expected:
        assert_same(next(again), batch)
    assert again.stats() == first.stats() and again.state_dict() == first.state_dict()
    begun = stream(start_step=5)
    assert begun.state_dict() == state
    assert_same(next(begun), expected[0])


def test_closing_loses_nothing(stream):
    a, b = stream(), stream(prefetch=0)
    for _ in range(3):
        assert_same(next(a), next(b))
        a.close()


def test_hosts_share_the_same_rows(stream):
    whole = stream()
    parts = [stream(row_indices=n) for n in ([0, 1], [2, 3])]
    for _ in range(4):
        batch, halves = next(whole), [next(p) for p in parts]
        for field in dataclasses.fields(batch):
            both = getattr(halves[0], field.name), getattr(halves[1], field.name)
            if both[0] is not None:
                np.testing.assert_array_equal(np.concatenate(both), getattr(batch, field.name))
    assert merge_iterator_states([p.state_dict() for p in reversed(parts)]) == whole.state_dict()
    # A state taken on one number of hosts is good on another; what it lacks is packed again.
    expected = next(whole)
    for place in (merge_iterator_states([p.state_dict() for p in parts]), parts[1].state_dict()):
        moved = stream()
        moved.load_state(place)
        assert_same(next(moved), expected)


def test_seed_and_rows_matter(stream):
    a, b = next(stream()), next(stream(seed=2))
    assert (a.tokens != b.tokens).any() and (a.tokens[0] != a.tokens[1]).any()
    assert_same(
        next(stream(batch_size=2)),
        dataclasses.replace(
            a,
            **{
                f.name: getattr(a, f.name)[:2]
                for f in dataclasses.fields(a)
                if getattr(a, f.name) is not None
            },
        ),
    )


class Troubled:
    """Every third image is broken; every fifth document is too long."""

    def document(self, rng, index):
        image = b"broken" if index % 3 == 0 else np.zeros((16, 16, 3), np.uint8)
        text = "w " * (200 if index % 5 == 0 else 5)
        return interleaved([text, Picture(image, seen=True, dreamed=False), "end"], "joint")


def test_what_is_lost_is_counted():
    s = BatchStream(Troubled(), WordTokenizer(), LAYOUT, batch_size=1, seed=0, lookahead=1, prefetch=0)
    batch = next(s)
    for _ in range(5):
        next(s)
    stats = s.stats()
    read = s.state_dict()["rows"]["0"]["next"] - len(s.state_dict()["rows"]["0"]["waiting"])
    assert stats["documents"] == read and stats["empty_documents"] == 0
    assert abs(stats["broken_images"] - read / 3) <= 1
    long = [i for i in range(read) if i % 5 == 0]
    assert stats["dropped_images"] == sum(i % 3 != 0 for i in long)
    assert stats["dropped_tokens"] == len(long) * (200 + 1 - (LAYOUT.room - 2))
    assert 0 < stats["pad_share"] < 1
    assert (batch.image_slots >= 0).sum() == 4 * batch.image_mask.sum()


def test_the_threads_error_comes_through(tokenizer):
    class Failing:
        def document(self, rng, index):
            raise KeyError("the source broke")

    s = BatchStream(Failing(), tokenizer, LAYOUT, batch_size=1, seed=0)
    for _ in range(2):
        with pytest.raises(KeyError, match="the source broke"):
            next(s)
    s.close()


def test_from_configs(tokenizer):
    model = DreamLLMConfig(vision=ClipVisionConfig(image_size=16, patch_size=8))
    data = DataConfig(
        source=SOURCE, source_options={"kinds": {"conversations": 1.0}}, batch_size=2, length=64
    )
    stream = batches(data, model, tokenizer, seed=0)
    batch = next(stream)
    stream.close()
    assert batch.tokens.shape == (2, 64) and batch.images.shape == (2, 8, 16, 16, 3)
    assert batch.dream_images is None and batch.dream_mask.shape == (2, 0)
    with pytest.raises(ValueError, match="data.source is not set"):
        batches(DataConfig(), model, tokenizer, seed=0)
    with pytest.raises(ValueError, match="data.source_options.kinds: no kind has a weight"):
        batches(DataConfig(source=SOURCE, source_options={"kinds": {}}), model, tokenizer, seed=0)
    with pytest.raises(ValueError, match="left nothing to learn"):  # nothing can be drawn without a decoder
        config = dataclasses.replace(data, source_options={"kinds": {"pairs": 1.0}}, mode="creation")
        next(batches(config, model, tokenizer, seed=0))


def test_documents_keep_to_the_positions_of_the_language_model(tokenizer):
    """A row may be longer than its documents can be: with 20 positions none reaches further."""
    llama = LlamaConfig(vocab_size=512, hidden_size=8, num_attention_heads=2, max_position_embeddings=20)
    model = DreamLLMConfig(llama=llama, vision=ClipVisionConfig(image_size=16, patch_size=8))
    data = DataConfig(
        source=SOURCE,
        source_options={"kinds": {"documents": 1.0}},
        mode="comprehension",
        batch_size=2,
        length=128,
    )

    def longest(model):
        with closing(batches(data, model, tokenizer, seed=0)) as stream:
            positions = max(int(next(stream).positions.max()) for _ in range(5))
            return positions + 1, stream.stats()["dropped_images"]

    short, lost = longest(model)
    assert short <= 20 and lost > 0
    roomy = dataclasses.replace(llama, max_position_embeddings=500)
    long, lost = longest(dataclasses.replace(model, llama=roomy))
    assert long > 40 and lost == 0
