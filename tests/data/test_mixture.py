"""Mixtures of files, from the config to batches: order, shares, what is broken, and what is missing."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ClipVisionConfig, UNetConfig, VaeConfig
from dreamllm_jax.data.formats.base import Format
from dreamllm_jax.data.mixture import Mixture
from dreamllm_jax.data.pieces import Text
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.data.sources import check_source, open_documents
from tests.data.datasets import BROKEN, picture, write_folder, write_json, write_lines, write_tar
from tests.data.fakes import WordTokenizer

MODEL = DreamLLMConfig(
    vision=ClipVisionConfig(image_size=16, patch_size=8),
    unet=UNetConfig(),
    vae=VaeConfig(),
    num_dream_queries=3,
    image_size=16,
)


class Numbered(Format):
    """`size` documents that say their own number."""

    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def document(self, number, rng):
        return [Text(f"{self.name}{number}")]


def drawn(mixture, indices):
    return [mixture.document(np.random.default_rng(0), i)[0].text for i in indices]


def test_an_epoch_has_every_record_once_and_the_next_another_order():
    mixture = Mixture([Numbered("a", 50)], [1.0], seed=0)
    first, second = drawn(mixture, range(50)), drawn(mixture, range(50, 100))
    assert set(first) == set(second) == {f"a{i}" for i in range(50)}
    assert first != second and first != sorted(first, key=lambda s: int(s[1:]))
    assert drawn(mixture, [7, 3]) == [first[7], first[3]]  # at random
    again, other = (Mixture([Numbered("a", 50)], [1.0], seed=s) for s in (0, 1))
    assert drawn(again, range(50)) == first and drawn(other, range(50)) != first


def test_shares_are_exact_and_every_row_reads_every_source():
    mixture = Mixture([Numbered("a", 7), Numbered("b", 300)], [1.0, 3.0], seed=0)
    window = range(4096)
    names = drawn(mixture, window)
    counts = collections.Counter(name[0] for name in names)
    assert counts == {"a": 1024, "b": 3072}
    assert max(collections.Counter(n for n in names if n[0] == "b").values()) <= 11  # 3072 / 300, rounded up
    row = collections.Counter(name[0] for name in names[::64])  # weights and rows share factors
    assert 4 <= row["a"] <= 32


@pytest.fixture
def folder(tmp_path):
    """A source of each kind, with two broken images and two broken records among them."""
    images = {f"{c}.png": picture(c) for c in ("red", "blue")} | {"torn.png": BROKEN}
    write_folder(tmp_path / "images", images)
    pairs = {"0.png": picture(), "0.txt": b"a red field", "1.png": BROKEN, "1.txt": b"torn"}
    write_tar(tmp_path / "pairs-000.tar", pairs)
    infos = [{"image_name": f"{c}.png", "matched_text_index": 0, "matched_sim": 0.5} for c in ("red", "torn")]
    document = {"text_list": ["a field", "its end"], "image_info": infos}
    write_lines(tmp_path / "docs.jsonl", [document, "{broken"])
    talk = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "blue"}]
    write_json(tmp_path / "talks.json", [{"image": "blue.png", "conversations": talk}, {"image": "blue.png"}])
    write_json(tmp_path / "instruct.json", [document | {"instruction": "draw a field"}])
    return tmp_path


def config(folder, **changes):
    images = dict(images=str(folder / "images"))
    talking = images | dict(template="plain")
    sources = [
        dict(format="pairs", path=f"{folder}/pairs-{{000..000}}.tar", weight=2),
        dict(format="interleaved", path=f"{folder}/*.jsonl", options=images, weight=2),
        dict(format="conversations", path=f"{folder}/talks.json", options=talking, weight=2),
        dict(format="instructions", path=f"{folder}/instruct.json", options=talking, weight=1),
    ]
    data = dict(sources=sources, batch_size=2, length=48, max_images=4, max_dreams=4, prefetch=0)
    return build(DataConfig, data | changes)


def test_from_files_to_batches(folder):
    data = config(folder)
    check_source(data, WordTokenizer())
    stream = batches(data, MODEL, WordTokenizer(), seed=0)
    seen = [next(stream) for _ in range(40)]
    assert seen[0].tokens.shape == (2, 48) and seen[0].images.shape == (2, 4, 16, 16, 3)
    pixels = np.concatenate([b.images[b.image_mask][:, 0, 0] for b in seen])
    assert {tuple(p) for p in pixels} == {
        (255, 0, 0),
        (0, 0, 255),
    }  # none is black: broken ones are no images
    for batch in seen:
        assert (batch.image_slots >= 0).sum() == 4 * batch.image_mask.sum()
        assert (batch.dream_slots >= 0).sum() == 3 * batch.dream_mask.sum()
    stats = stream.stats()
    total = stats["documents"] + stats["empty_documents"] + stats["broken_documents"]
    assert abs(stats["broken_documents"] / total - 2 / 7) < 0.06  # one of two documents, one of two talks
    assert (
        abs(stats["broken_images"] / total - 3 / 7) < 0.06
    )  # one of two pairs, the other document, instruct
    assert stats["dropped_images"] == stats["dropped_tokens"] == 0


def test_resuming_is_exact(folder):
    data = config(folder)
    first = batches(data, MODEL, WordTokenizer(), seed=3)
    for _ in range(3):
        next(first)
    again = batches(data, MODEL, first._tokenizer, seed=3)
    again.load_state(json.loads(json.dumps(first.state_dict())))
    a, b = next(first), next(again)
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)
    assert first.stats() == again.stats()


def test_states_from_before_a_count_was_added_still_load(folder):
    stream = batches(config(folder), MODEL, WordTokenizer(), seed=0)
    next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    for row in state["rows"].values():
        del row["counts"]["broken_documents"]
    stream.load_state(state)
    next(stream)
    assert "broken_documents" in stream.stats()


def test_what_is_missing_is_named(folder):
    for field, value, sentence in (
        (
            "path",
            f"{folder}/pairs-{{000..001}}.tar",
            r"data.sources \(pairs\) path: there is no '.*-001.tar'",
        ),
        ("path", f"{folder}/*.tgz", r"data.sources \(pairs\) path: there is no"),
    ):
        data = config(folder, sources=[{"format": "pairs", "path": value}])
        assert getattr(data.sources[0], field) == value
        for look in (check_source, lambda data, tokenizer: open_documents(data, 16, tokenizer)):
            with pytest.raises(ValueError, match=sentence):
                look(data, WordTokenizer())
    lost = dict(format="conversations", path=f"{folder}/talks.json", options=dict(images=f"{folder}/lost"))
    with pytest.raises(ValueError, match=r"data.sources \(conversations\) images: there is no '.*/lost'"):
        check_source(config(folder, sources=[lost]), WordTokenizer())
    write_json(folder / "none.json", [])
    with pytest.raises(ValueError, match="'.*none.json' holds no record"):
        empty = config(folder, sources=[{"format": "conversations", "path": f"{folder}/none.json"}])
        open_documents(empty, 16, WordTokenizer())
    odd = dict(format="conversations", path=f"{folder}/talks.json", options=dict(template="vicuna"))
    with pytest.raises(ValueError, match=r"conversations\) template: Unknown .* template 'vicuna'"):
        check_source(config(folder, sources=[odd]), WordTokenizer())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(images="x"), r"\(pairs\) options: unknown key 'images'. Known keys: caption_key"),
        (dict(format="interleaved"), r"\(interleaved\) options: key 'images' is missing"),
        (dict(min_similarity=0.3), r"\(pairs\) options: unknown key 'min_similarity'"),
        (dict(format="conversations", caption_key="text"), r"options: unknown key 'caption_key'"),
        (dict(format="instructions", images=3), r"\(instructions\) options.images: got 3"),
        (dict(format="math:sqrt"), r"math:sqrt is not a data format; name a subclass of .*base.Format"),
        (dict(format="math:no"), r"\(math:no\) format 'math:no': the module 'math' has no 'no'"),
    ],
)
def test_options_that_a_format_does_not_have(tmp_path, change, sentence):
    (tmp_path / "a.tar").touch()
    kind = change.pop("format", "pairs")
    data = build(DataConfig, {"sources": [{"format": kind, "path": f"{tmp_path}/a.tar", "options": change}]})
    for check in (check_source, lambda data, tokenizer: open_documents(data, 16, tokenizer)):
        with pytest.raises(ValueError, match=sentence):
            check(data, WordTokenizer())
