"""What users' records become: pairs, documents, instructions and conversations, broken ones among them."""

import numpy as np
import pytest

from dreamllm_jax.data.files import BrokenRecord
from dreamllm_jax.data.formats.base import FormatContext
from dreamllm_jax.data.formats.instruct_mmc4 import Instructions
from dreamllm_jax.data.formats.llava import Conversations
from dreamllm_jax.data.formats.mmc4 import Interleaved
from dreamllm_jax.data.formats.webdataset import Pairs
from dreamllm_jax.data.pieces import End, Picture, Text
from tests.data.datasets import BROKEN, picture, write_json, write_lines, write_tar
from tests.data.fakes import WordTokenizer

RED, BLUE = picture("red"), picture("blue", format="JPEG")


def opened(kind, paths, mode="joint", **options):
    return kind(paths, kind.Options(**options), FormatContext(mode, WordTokenizer()))


def rng():
    return np.random.default_rng(0)


def shown(pieces):
    """Text as strings, images as their names, learned text in capitals, ends as </s>."""
    words = {Text: lambda p: p.text.upper() if p.supervised else p.text, End: lambda p: "</s>"}

    def picture_name(p):
        return f"{'dream' * p.dreamed}{'see' * p.seen}:{getattr(p.image, 'name', '?')}"

    return [words[type(p)](p) if type(p) in words else picture_name(p) for p in pieces]


def pairs_tar(path):
    files = {
        "a/000.jpg": BLUE,
        "a/000.txt": b" a blue field \n",
        "a/000.json": b'{"caption": "blue, says json", "key": "000"}',
        "a/001.png": RED,
        "a/001.txt": "rosé".encode(),
        "a/001.json": b'{"key": "001"}',
        "a/002.jpg": BROKEN,
        "a/002.txt": b"nobody knows",
        "a/002.json": b"{",
        "a/003.jpg": RED,  # no caption
        "a/004.txt": b"no image",
        "a/005.seg.png": RED,  # another image of the sample, by a longer suffix
        "a/005.webp": BLUE,
        "a/005.txt": b"\xff\xfe",
        "b/005.jpg": RED,  # the same stem elsewhere is another sample
        "b/005.txt": b"  ",
    }
    return write_tar(path, files)


def test_pairs(tmp_path):
    with pytest.warns(
        UserWarning, match=r"1 tars\): 2 pairs lack an image or its .txt and are left out; 5 are"
    ):
        pairs = opened(Pairs, [pairs_tar(tmp_path / "0.tar")], "comprehension")
    assert len(pairs) == 5
    first = pairs.document(0, rng())
    assert shown(first) == ["see:?", "A BLUE FIELD", "</s>"] and first[0].image == BLUE
    assert pairs.document(1, rng())[0].image == RED and shown(pairs.document(1, rng()))[1] == "ROSÉ"
    assert pairs.document(2, rng())[0].image == BROKEN  # left to whoever opens it
    with pytest.raises(BrokenRecord, match="0.tar: pair 3 is left out: its caption cannot be read"):
        pairs.document(3, rng())
    with pytest.raises(BrokenRecord, match="pair 4 is left out: it has no caption"):
        pairs.document(4, rng())


def test_captions_in_json(tmp_path):
    with pytest.warns(UserWarning, match="lack an image or its .json"):
        pairs = opened(Pairs, [pairs_tar(tmp_path / "0.tar")], "creation", caption_key="caption")
    assert shown(pairs.document(0, rng())) == ["blue, says json", "dream:?", "</s>"]
    for number, why in ((1, "KeyError"), (2, "JSONDecodeError")):
        with pytest.raises(BrokenRecord, match=why):
            pairs.document(number, rng())


def test_many_tars_and_both_directions(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", {f"{i}.png": RED, f"{i}.txt": b"%d" % i}) for i in range(3)]
    pairs = opened(Pairs, paths)
    texts = [next(p.text for p in pairs.document(i, rng()) if isinstance(p, Text)) for i in range(3)]
    assert texts == ["0", "1", "2"]
    draws = np.random.default_rng(0)
    seen = [isinstance(pairs.document(0, draws)[0], Picture) for _ in range(20)]
    assert {True, False} == set(seen)
    with pytest.raises(ValueError, match="no image has its .json beside it; set caption_key"):
        opened(Pairs, paths, caption_key="caption")


MMC4 = {
    "text_list": ["One.", " Two. ", "Three.", "Four."],
    "image_info": [
        {"image_name": "late.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "early.png", "matched_text_index": 0, "matched_sim": 0.2},
        {"image_name": "same.png", "matched_text_index": 2},
    ],
}


def mmc4(path, records):
    return [write_lines(path / "docs.jsonl", records)]


def test_mmc4_documents(tmp_path):
    paths, images = mmc4(tmp_path, [MMC4]), str(tmp_path)
    documents = opened(Interleaved, paths, images=images)
    expected = [
        "ONE.",
        "dreamsee:early.png",
        "TWO. THREE.",
        "dreamsee:late.png",
        "dreamsee:same.png",
        "FOUR.",
    ]
    assert shown(documents.document(0, rng())) == [*expected, "</s>"]
    similar = opened(Interleaved, paths, "comprehension", images=images, min_similarity=0.25)
    expected = ["ONE. TWO. THREE.", "see:late.png", "see:same.png", "FOUR.", "</s>"]
    assert shown(similar.document(0, rng())) == expected


def test_broken_mmc4_documents(tmp_path):
    outside = MMC4 | {"image_info": [{"image_name": "x.png", "matched_text_index": 4}]}
    records = ["{torn", {"text_list": ["One."]}, MMC4 | {"text_list": None}, outside, MMC4]
    documents = opened(Interleaved, mmc4(tmp_path, records), images=str(tmp_path))
    for number, why in ((0, "not JSON"), (1, "KeyError"), (2, "TypeError"), (3, "sentence 4 of 4")):
        with pytest.raises(BrokenRecord, match=why):
            documents.document(number, rng())
    assert documents.document(4, rng())


def test_instructions(tmp_path):
    paths = [write_json(tmp_path / "a.json", [MMC4 | {"instruction": " Tell me. "}, MMC4])]
    images = str(tmp_path)
    instructions = opened(Instructions, paths, images=images, min_similarity=0.25, template="plain")
    expected = ["Tell me.", "ONE. TWO. THREE.", "dreamsee:late.png", "dreamsee:same.png", "FOUR.", "</s>"]
    assert shown(instructions.document(0, rng())) == expected
    assert instructions.document(0, rng())[2].supervised  # the model decides when to draw
    vicuna = opened(Instructions, paths, images=images)
    assert shown(vicuna.document(0, rng()))[0].endswith("USER: Tell me. ASSISTANT:")
    with pytest.raises(BrokenRecord, match="record 1 is left out: it has no instruction"):
        instructions.document(1, rng())


def turns(*values):
    roles = ("human", "gpt") * len(values)
    return [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)]


def test_conversations(tmp_path):
    records = [
        {"id": 0, "image": "a.png", "conversations": turns("<image>\nWhat?", " A. ", "Sure?", "Yes.")},
        {"id": 1, "conversations": turns("Hi", "Hello", "Unanswered")},
        {"id": 2, "image": "a.png", "conversations": turns("Draw an a.", "Here: <dream> Right?")},
        {"id": 3, "image": ["a.png", "b.png"], "conversations": turns("<image> or <image>?", "B.")},
        {"id": 4, "conversations": [{"from": "gpt", "value": "Before"}, *turns("Hi", "Hello")]},
    ]
    paths = [write_json(tmp_path / "a.json", records)]
    source = opened(Conversations, paths, images=str(tmp_path), template="plain")
    expected = [
        ["see:a.png", "\nWhat?", "A.", "</s>", "Sure?", "YES.", "</s>"],
        ["Hi", "HELLO", "</s>"],
        ["Draw an a.", "HERE: ", "dreamsee:a.png", " RIGHT?", "</s>"],
        ["see:a.png", " or ", "see:b.png", "?", "B.", "</s>"],
        ["Hi", "HELLO", "</s>"],
    ]
    assert [shown(source.document(i, rng())) for i in range(5)] == expected


def test_broken_conversations(tmp_path):
    records = [
        {"id": 0, "conversations": turns("<image> what?", "A.")},
        {"id": 1, "image": ["a.png"], "conversations": turns("<image> or <image>?", "A.")},
        {"id": 2, "conversations": [*turns("Hi", "Hello"), {"from": "gpt", "value": "Again"}]},
        {"id": 3, "conversations": [{"from": "human"}]},
        {"id": 4},
        {"id": 5, "conversations": []},
        {"id": 6, "conversations": [{"from": "human", "value": None}]},
    ]
    source = opened(Conversations, [write_json(tmp_path / "a.json", records)], images=str(tmp_path))
    for number in range(len(records)):
        with pytest.raises(BrokenRecord, match=f"conversation {number} is left out"):
            source.document(number, rng())
    path = write_json(tmp_path / "b.json", [{"image": "a.png", "conversations": turns("<image>", "A.")}])
    with pytest.raises(BrokenRecord, match="the source's options name no images"):
        opened(Conversations, [path]).document(0, rng())
