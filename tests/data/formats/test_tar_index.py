"""The index of tars: read once, reused while they stay, made again where they or the index do not."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest

from dreamllm_jax.config.base import build
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.data.formats import tar_index
from dreamllm_jax.data.formats.base import FormatContext
from dreamllm_jax.data.formats.tar_index import update_index
from dreamllm_jax.data.formats.webdataset import Pairs, PairsOptions
from dreamllm_jax.data.mixture import index_sources, open_format
from dreamllm_jax.data.pieces import Picture, Text
from dreamllm_jax.data.sources import open_documents
from tests.data.datasets import picture, write_tar
from tests.data.fakes import WordTokenizer

IMAGES = [picture(colour) for colour in ("red", "green", "blue", "white")]


def write_pairs(path, *numbers):
    files = {f"{n}.png": IMAGES[n % 4] for n in numbers} | {f"{n}.txt": b"pair %d" % n for n in numbers}
    return write_tar(path, {name: files[name] for name in sorted(files)})


@pytest.fixture
def read(monkeypatch):
    """How often the headers of each tar were read, by its name."""
    count, members = Counter(), tar_index.members

    def counted(path):
        count[path.name] += 1
        return members(path)

    monkeypatch.setattr(tar_index, "members", counted)
    return count


@pytest.fixture
def tars(tmp_path):
    return [write_pairs(tmp_path / f"{i}.tar", 2 * i, 2 * i + 1) for i in range(3)]


def open_pairs(tars, index=None):
    return Pairs(tars, PairsOptions(), FormatContext("creation", WordTokenizer(), index))


def contents(pairs):
    """Every pair's text, and whether its image is the right one."""
    found = []
    for number in range(len(pairs)):
        pieces = pairs.document(number, np.random.default_rng(0))
        (text,) = (p.text for p in pieces if isinstance(p, Text))
        (image,) = (p.image for p in pieces if isinstance(p, Picture))
        found.append((int(text.split()[1]), image == IMAGES[int(text.split()[1]) % 4]))
    return found


def opened(tars, file):
    update_index(tars, ".txt", file)
    return contents(open_pairs(tars, file))


def right(*numbers):
    return [(number, True) for number in numbers]


def test_a_restart_reads_no_tar(tars, read, tmp_path):
    file = tmp_path / "made" / "index"
    assert opened(tars, file) == right(*range(6)) == contents(open_pairs(tars))
    assert read == {"0.tar": 2, "1.tar": 2, "2.tar": 2}  # without an index, once more
    before = file.stat().st_mtime_ns
    assert opened(tars, file) == right(*range(6))
    assert read.total() == 6 and file.stat().st_mtime_ns == before
    assert [path.name for path in file.parent.iterdir()] == ["index"]


def test_only_what_changed_is_read_again(tars, read, tmp_path):
    file = tmp_path / "index"
    opened(tars, file)
    read.clear()
    write_pairs(tars[1], 7, 8, 9)  # another size
    assert opened(tars, file) == right(0, 1, 7, 8, 9, 4, 5) and read == {"1.tar": 1}
    write_pairs(tars[2], 5, 4)  # the same size, another time
    os.utime(tars[2], ns=(0, 123_456_789))
    opened(tars, file)
    assert read == {"1.tar": 1, "2.tar": 1}
    more = [write_pairs(tmp_path / "00.tar", 6), *tars[:2]]  # one more before the others, one less
    assert opened(more, file) == right(6, 0, 1, 7, 8, 9) and read == {"1.tar": 1, "2.tar": 1, "00.tar": 1}
    opened(tars, file)
    assert read["2.tar"] == 2  # it was forgotten
    assert contents(open_pairs([tars[0], tars[0]], file)) == right(0, 1, 0, 1)  # a tar twice


def damaged(file, kind):
    data = file.read_bytes()
    if kind.startswith("byte"):
        at = int(kind.split()[1])
        data = bytearray(data)
        data[at] ^= 1
    cut = {"cut": data[: len(data) // 2], "empty": b"", "longer": data + b"\0", "foreign": b"PK\x03\x04" * 99}
    file.write_bytes(cut[kind] if kind in cut else bytes(data))


@pytest.mark.parametrize(
    "kind", ["byte 3", "byte 40", "byte 150", "byte -3", "byte -40", "cut", "empty", "longer", "foreign"]
)
def test_a_damaged_index_is_made_again(tars, read, tmp_path, kind):
    file = tmp_path / "index"
    opened(tars, file)
    whole = file.read_bytes()
    damaged(file, kind)
    with pytest.warns(UserWarning, match="index is damaged, or is not an index of pairs with .txt; the"):
        assert opened(tars, file) == right(*range(6))
    assert read == {"0.tar": 2, "1.tar": 2, "2.tar": 2} and file.read_bytes() == whole


def test_an_index_of_other_captions_or_of_other_tars_is_not_used(tars, read, tmp_path):
    file, json_file = tmp_path / "index", tmp_path / "json"
    opened(tars, file)
    update_index(tars, ".json", json_file)
    shutil.copy(json_file, file)
    with pytest.warns(UserWarning, match="not an index of pairs with .txt"):
        assert opened(tars, file) == right(*range(6))
    (tmp_path / "elsewhere").mkdir()
    moved = [tmp_path / "elsewhere" / tar.name for tar in tars]
    for tar, other in zip(tars, moved, strict=True):
        shutil.copy2(tar, other)  # of the same size and time
    read.clear()
    opened(moved, file)
    assert read.total() == 3


def test_who_only_reads_the_index_does_not_write_it(tars, read, tmp_path):
    """A process that sees other tars than process 0 saw reads them itself."""
    file = tmp_path / "index"
    opened(tars, file)
    before = file.read_bytes()
    write_pairs(tars[0], 3, 2, 1)
    read.clear()
    assert contents(open_pairs(tars, file)) == right(1, 2, 3, 2, 3, 4, 5) and read == {"0.tar": 1}
    assert file.read_bytes() == before
    assert len(open_pairs(tars, tmp_path / "none")) == 7 and not (tmp_path / "none").exists()


def test_pairs_that_are_not_whole_are_told_every_time(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"0.png": IMAGES[0], "0.txt": b"pair 0", "1.png": IMAGES[1]})
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 pairs lack an image or its .txt .* 1 are complete"):
            assert opened([tar], tmp_path / "index") == right(0)


def test_sources_of_a_config(tars, read, tmp_path):
    """Each has an index of its own, which the source is then opened with; other files are named."""
    sources = [
        dict(format="pairs", path=f"{tmp_path}/{{0..1}}.tar"),
        dict(format="pairs", path=f"{tmp_path}/2.tar", weight=2),
    ]
    config = build(DataConfig, dict(sources=sources, mode="creation"))
    folder = tmp_path / "index"
    files = index_sources(config.sources, folder)
    assert sorted(files) == sorted(folder.iterdir()) and len(files) == 2
    mixture = open_documents(config, 16, WordTokenizer(), index_folder=folder)
    assert [contents(r) for r in mixture.formats] == [right(0, 1, 2, 3), right(4, 5)] and read.total() == 3
    assert len(open_format(config.sources[0], "creation", WordTokenizer())) == 4 and read.total() == 5
    (tmp_path / "no.tar").write_bytes(b"<html>not found</html>")
    wrong = build(DataConfig, dict(sources=[dict(format="pairs", path=f"{tmp_path}/no.tar")]))
    with pytest.raises(ValueError, match="no.tar is not an uncompressed tar"):
        index_sources(wrong.sources, folder)
    assert sorted(files) == sorted(folder.iterdir())
