"""Files of records: path patterns, and random access to the records of json and jsonl files."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_CHUNK = 1 << 24


class BrokenRecord(ValueError):
    """A record cannot be used. It is left out and counted, and training continues."""


def find_files(pattern: str, where: str) -> list[Path]:
    """Returns the files (or folders) of a pattern with globs and ranges, sorted within each glob.

    Raises:
      ValueError: nothing matches, or a file that a range names is missing; `where` says which setting to
        correct.
    """
    found: list[Path] = []
    pattern = str(Path(pattern).expanduser())
    for name in _expand_braces(pattern):
        if Path(name).exists():
            found.append(Path(name))
            continue
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            part = "" if name == pattern else f" (from {pattern!r})"
            raise ValueError(f"{where}: there is no {name!r}{part}; correct the path, or put the data there.")
        found += map(Path, matches)
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """Returns the names that a shell makes of `{a,b}` and `{00..11}`.

    Example: "x{0..1}.{a,b}" gives x0.a, x0.b, x1.a and x1.b.
    """
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = bounds.groups()
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


class JsonRecords:
    """The records of several json (a list) and jsonl (one record a line) files, one after another.

    Of a jsonl file only the offsets and lengths of its lines are kept in memory.
    """

    def __init__(self, paths: Sequence[Path]):
        """Raises ValueError for a file of another type, or a json file that cannot be read."""
        self.files = [_open(path) for path in paths]
        self._ends = np.array(list(itertools.accumulate(len(f) for f in self.files)), np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns record `number`.

        Raises:
          BrokenRecord: it is not a JSON object.
        """
        at = int(np.searchsorted(self._ends, number, side="right"))
        file = self.files[at]
        number -= int(self._ends[at]) - len(file)
        record = file[number]
        if not isinstance(record, dict):
            _broken(file.path, number, f"it is a {type(record).__name__}, not an object")
        return record


class _Lines:
    """A jsonl file."""

    def __init__(self, path: Path):
        self.path = path
        starts = _line_starts(path)
        lengths = np.diff(starts)
        kept = lengths > 1  # not the empty ones
        self._starts, self._lengths = starts[:-1][kept], lengths[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[number]))
            line = file.read(int(self._lengths[number]))
        try:
            return json.loads(line)
        except ValueError as error:  # also raised for bytes that are not UTF-8
            _broken(self.path, number, f"it is not JSON ({error})")


class _List:
    """A json file that holds a list."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._records = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not readable JSON ({error}); the file is damaged.") from error
        if not isinstance(self._records, list):
            raise ValueError(f"{path} holds a {type(self._records).__name__}; a list of records is needed.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Any:
        return self._records[number]


def _open(path: Path) -> _Lines | _List:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} is not a .json or .jsonl file; unpack it, or correct the path.")
    return _Lines(path) if path.suffix == ".jsonl" else _List(path)


def _line_starts(path: Path) -> Int[np.ndarray, " lines"]:
    """Returns the offset of each line, and of the end of the file."""
    starts, at = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            starts.append(newlines.astype(np.int64) + at + 1)
            at += len(chunk)
    return np.unique(np.concatenate([*starts, np.array([at], np.int64)]))


def _broken(path: Path, number: int, why: str) -> NoReturn:
    raise BrokenRecord(f"{path}: record {number} is left out: {why}.")
