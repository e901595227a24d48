"""Patterns, records of json and jsonl, and images in folders, zips and tars."""

import numpy as np
import pytest
from PIL import Image

from dreamllm_jax.data import files
from dreamllm_jax.data.archives import members, open_images
from dreamllm_jax.data.files import BrokenRecord, JsonRecords, find_files
from dreamllm_jax.data.images import to_rgb
from tests.data.datasets import picture, write_folder, write_json, write_lines, write_tar, write_zip


def test_patterns(tmp_path):
    names = ("00008.tar", "00009.tar", "00010.tar", "b/x.tar", "c/x.tar")
    write_folder(tmp_path, dict.fromkeys(names, b""))

    def found(pattern):
        return [str(p.relative_to(tmp_path)) for p in find_files(f"{tmp_path}/{pattern}", "path")]

    assert found("{00008..00010}.tar") == ["00008.tar", "00009.tar", "00010.tar"]
    assert found("000*.tar") == ["00008.tar", "00009.tar", "00010.tar"]
    assert found("{c,b}/*.tar") == ["c/x.tar", "b/x.tar"]
    assert found("**/x.tar") == ["b/x.tar", "c/x.tar"]
    with pytest.raises(
        ValueError, match=r"path: there is no '.*00011.tar' \(from '.*\{00009..00011\}.tar'\)"
    ):
        found("{00009..00011}.tar")
    with pytest.raises(ValueError, match="path: there is no '.*/nothing/'|path: there is no '.*/nothing'"):
        found("nothing")


def test_records_of_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)  # lines that lie across chunks
    write_lines(tmp_path / "a.jsonl", [{"n": 0}, "", {"n": 1, "text": "é" * 9}, '{"n": 2', [3], {"n": 4}])
    (tmp_path / "b.jsonl").write_bytes(b'{"n": 5}\r\n\xff\xfe broken\n')
    write_json(tmp_path / "c.json", [{"n": 7}, {"n": 8}])
    records = JsonRecords([tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.json")])
    assert len(records) == 9
    assert [records[i]["n"] for i in (0, 1, 4, 5, 7, 8)] == [0, 1, 4, 5, 7, 8]
    for number, why in (
        (2, "a.jsonl: record 2 .* not JSON"),
        (3, "a list"),
        (6, "b.jsonl: record 1 .* not JSON"),
    ):
        with pytest.raises(BrokenRecord, match=why):
            records[number]


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(ValueError, match="a.json is not readable JSON"):
        JsonRecords([tmp_path / "a.json"])
    write_json(tmp_path / "b.json", {"data": []})
    with pytest.raises(ValueError, match="b.json holds a dict; a list of records is needed"):
        JsonRecords([tmp_path / "b.json"])
    with pytest.raises(ValueError, match="c.jsonl.gz is not a .json or .jsonl file"):
        JsonRecords([tmp_path / "c.jsonl.gz"])


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_pictures_by_name(tmp_path, kind):
    stored = {"train/a.png": picture("red"), "train/b.jpg": picture("blue", format="JPEG"), "c.png": b""}
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    images = open_images([write(tmp_path / f"images{'.' + kind if kind != 'folder' else ''}", stored)])

    def colour(name):
        return np.asarray(to_rgb(images.find(name)))[0, 0].argmax()

    assert colour("train/a.png") == 0 and colour("train/b.jpg") == 2
    assert colour("train/b.png") == 2  # stored under another suffix
    for name in ("c.png", "nowhere.png"):
        with pytest.raises(ValueError, match="Cannot read image"):
            to_rgb(images.find(name))


def test_archives_without_folders_are_found_by_bare_name(tmp_path):
    images = open_images(
        [write_tar(tmp_path / "1.tar", {"x.png": picture()}), write_zip(tmp_path / "2.zip", {})]
    )
    assert isinstance(images.find("some/folder/x.jpg"), bytes) and len(images) == 1


def test_torn_archives(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": picture(size=(64, 64)) for i in range(9)})
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 * 5 + 100])
    with pytest.warns(UserWarning, match="a.tar is truncated after 2 files"):
        assert [m.name for m in members(path)] == ["0.png", "1.png"]
    path.write_bytes(b"\x1f\x8b" + whole[:100])
    with pytest.raises(ValueError, match="a.tar is not an uncompressed tar"):
        list(members(path))
    broken = tmp_path / "b.zip"
    broken.write_bytes(write_zip(tmp_path / "c.zip", {"a.png": picture()}).read_bytes()[:-30])
    with pytest.raises(ValueError, match="b.zip is not a complete zip"):
        open_images([broken])
    with pytest.raises(ValueError, match="images.7z is not a .zip or .tar"):
        open_images([tmp_path / "images.7z"])
    with pytest.raises(ValueError, match="is a folder, and other paths are given too"):
        open_images([tmp_path, tmp_path])


def test_a_damaged_entry_is_a_broken_picture(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": picture(), "b.png": picture(), "c.png": picture()})
    data = bytearray(path.read_bytes())
    at = data.index(b"b.png") + 5
    data[at : at + 20] = b"\xff" * 20
    path.write_bytes(data)
    images = open_images([path])
    assert images.find("b.png") == b"" and Image.Image.verify(to_rgb(images.find("c.png"))) is None
