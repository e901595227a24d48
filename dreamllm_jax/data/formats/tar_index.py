"""Byte offsets of the pairs in webdataset tars: read once, kept in a file, read again for a changed tar."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dreamllm_jax.atomic import atomic_write
from dreamllm_jax.data.archives import IMAGE_SUFFIXES, Member, members

# One pair: offset and size of the image and of its caption in the tar, in bytes.
_PAIR = np.dtype([("image", "<i8"), ("image_size", "<u4"), ("caption", "<i8"), ("caption_size", "<u4")])

# An index file: this line, a line with the SHA-256 of the rest, a line of JSON, the pairs of all tars.
_KIND = b"dreamllm_jax index of pairs, 1\n"


class TarIndex(NamedTuple):
    """The complete `pairs` of one tar, and the number of incomplete ones.

    `size` (bytes) and `modified` (nanoseconds) are those of the tar when it was read.
    """

    size: int
    modified: int
    incomplete: int
    pairs: np.ndarray


def index_tars(paths: Sequence[Path], suffix: str, file: Path | None = None) -> list[TarIndex]:
    """Returns each tar's pairs of an image and a `suffix` file, from the index `file` or the tar's headers.

    An entry of `file` holds while the tar's path, size and time of change stay the same; `file` is not
    written here. A truncated tar is warned about when its headers are read.

    Raises:
      ValueError: a file is not a tar.
    """
    found = _index(paths, suffix, {} if file is None else _read(file, suffix))
    return [found[_name(path)] for path in paths]


def update_index(paths: Sequence[Path], suffix: str, file: Path) -> None:
    """Makes `file` the index of exactly these tars, reading the headers of those that are new or changed.

    Raises:
      ValueError: a file is not a tar.
      OSError: `file` cannot be written.
    """
    known = _read(file, suffix)
    found = _index(paths, suffix, known)
    if known.keys() != found.keys() or any(known[name] is not found[name] for name in found):
        _write(file, suffix, found)


def _name(path: Path) -> str:
    return str(path.absolute())


def _index(paths: Sequence[Path], suffix: str, known: dict[str, TarIndex]) -> dict[str, TarIndex]:
    """Returns the tars by name; known and unchanged ones are not read."""
    found, others = {}, []
    for path in paths:
        name, stat = _name(path), path.stat()
        if name in known and known[name][:2] == (stat.st_size, stat.st_mtime_ns):
            found[name] = known[name]
        else:
            others.append(path)
    for path in tqdm(others, "index", unit="tar", disable=len(others) < 10):
        found[_name(path)] = _scan(path, suffix)
    return found


def _scan(path: Path, suffix: str) -> TarIndex:
    stat, rows, incomplete = path.stat(), [], 0  # a later change is noticed next time
    for sample in _samples(path):
        image = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), None)
        if image is None or suffix not in sample:
            incomplete += 1
            continue
        caption = sample[suffix]
        rows.append((image.offset, image.size, caption.offset, caption.size))
    return TarIndex(stat.st_size, stat.st_mtime_ns, incomplete, np.array(rows, _PAIR))


def _samples(path: Path) -> Iterator[dict[str, Member]]:
    """Yields groups of consecutive files that share a key (the name up to the first dot), by suffix."""
    sample: dict[str, Member] = {}
    current = None
    for member in members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if (folder, stem) != current:
            if sample:
                yield sample
            sample, current = {}, (folder, stem)
        sample.setdefault("." + suffix.lower(), member)
    if sample:
        yield sample


def _read(file: Path, suffix: str) -> dict[str, TarIndex]:
    """Returns the tars of an index file; empty if the file is missing, damaged or not such an index."""
    if not file.exists():
        return {}
    with open(file, "rb") as stream:
        kind, digest, rest = stream.readline(80), stream.readline(80), stream.read()
    head, _, data = rest.partition(b"\n")
    intact = kind == _KIND and digest.decode("latin-1").strip() == hashlib.sha256(rest).hexdigest()
    header = json.loads(head) if intact else None
    if header is None or header["suffix"] != suffix:
        warnings.warn(
            f"{file} is damaged, or is not an index of pairs with {suffix}; the tars are read again.",
            stacklevel=2,
        )
        return {}
    pairs, start, found = np.frombuffer(data, _PAIR), 0, {}
    for name, size, modified, incomplete, number in header["tars"]:
        found[name] = TarIndex(size, modified, incomplete, pairs[start : start + number])
        start += number
    return found


def _write(file: Path, suffix: str, found: dict[str, TarIndex]) -> None:
    """Writes an index file atomically."""
    tars = [(name, t.size, t.modified, t.incomplete, len(t.pairs)) for name, t in found.items()]
    head = json.dumps({"suffix": suffix, "tars": tars}).encode() + b"\n"
    digest = hashlib.sha256(head)
    for tar in found.values():
        digest.update(tar.pairs.tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial, partial.open("wb") as stream:
        stream.write(_KIND + digest.hexdigest().encode() + b"\n" + head)
        for tar in found.values():
            stream.write(tar.pairs.tobytes())
