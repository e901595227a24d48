"""Writes files and folders completely or not at all: beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; renames it to `path` when the block ends without an error.

    The bytes are on the disk before the rename, so that even a power cut does not leave an incomplete file.
    On an error, what was written is removed and an existing `path` stays as it was.

    Example:

        with atomic_write("metrics.json") as beside:
            beside.write_text("{}")
    """
    path = Path(path)
    beside = _beside(path, "partial")
    try:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, completely or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder beside `folder` to write into; renames it when the block ends without an error.

    On an error, what was written is removed and an existing `folder` stays as it was.

    Raises:
      ValueError: `folder` exists and is not empty (unless `overwrite`), or is a file.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write into.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; give a new folder, or allow overwriting.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, old = _beside(folder, "partial"), _beside(folder, "old")
    beside.mkdir()
    try:
        yield beside
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """Returns a hidden name in the same folder that nothing else has."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}")
