"""Files and folders that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from dreamllm_jax.atomic import atomic_write, new_folder, write_text


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "a.txt"
    with atomic_write(file) as beside:
        beside.write_text("one")
        assert beside.parent == tmp_path and not file.exists()
    assert file.read_text() == "one"
    with atomic_write(str(file)) as beside:
        beside.write_text("two")
        assert file.read_text() == "one"
    assert file.read_text() == "two" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(error, tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(error), atomic_write(file) as beside:
        beside.write_text("ne")
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_share_a_file(tmp_path):
    with atomic_write(tmp_path / "a.txt") as first, atomic_write(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_the_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def rename(source, target):
        calls.append(("rename", Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "a.txt", "äöü")
    assert calls == [("fsync", 6), ("rename", 6)]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain.txt").write_text("")
    write_text(tmp_path / "atomic.txt", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain.txt", "atomic.txt")}
    assert len(modes) == 1


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), new_folder(target) as beside:
        (beside / "a").write_text("one")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as beside:
        (beside / "a").write_text("one")
        assert not target.exists()
    with pytest.raises(ValueError, match="not empty"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True) as beside:
        raise RuntimeError
    assert (target / "a").read_text() == "one"
    with new_folder(target, overwrite=True) as beside:
        (beside / "b").write_text("two")
    assert [file.name for file in target.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(ValueError, match="b is a file; give a folder"), new_folder(target / "b"):
        pass
