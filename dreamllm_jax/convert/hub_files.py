"""Compares files from the Hugging Face hub with the SHA-256 that huggingface_hub recorded at the download.

The safetensors format has no checksums. Where a SHA-256 was recorded, a flipped bit is found; elsewhere only
the structure of a file can be checked.

No library does this offline. `huggingface_hub.verify_repo_checksums` (`hf cache verify` on the command line)
asks the hub for the digests and needs the repository's name. The function that reads the local records is
private to huggingface_hub; it also creates folders and lock files beside the weights, which may lie on a disk
that cannot be written. The tests write the records with huggingface_hub, so that a new format is noticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECORD = re.compile(r".*\n([0-9a-f]{64})\n(\d+(?:\.\d+)?)\n")


def recorded_digest(file: Path) -> str | None:
    """Returns the SHA-256 of the content that the hub sent as `file`, or None where it is not known.

    In the hub's cache a file is a link to `blobs/<SHA-256>`. A download into a folder leaves a record,
    `.cache/huggingface/download/<name>.metadata`: the commit, the SHA-256 and the time, a line each. As in
    huggingface_hub, a record is ignored if the file was modified later (a second is allowed for coarse
    clocks) or if it cannot be parsed. Small files have a Git hash in place of the SHA-256; they are not
    checked.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    for folder in file.parents:
        record = folder / ".cache" / "huggingface" / "download" / f"{file.relative_to(folder)}.metadata"
        if record.is_file():
            found = _RECORD.match(record.read_text(encoding="utf-8"))
            return found[1] if found and file.stat().st_mtime <= float(found[2]) + 1 else None
    return None


def check_downloads(files: Iterable[Path]) -> None:
    """Checks every file whose SHA-256 is recorded; the others are left alone.

    Raises:
      ValueError: a file is not what the hub sent; it is named.
    """
    for file in files:
        digest = recorded_digest(file)
        if digest is None:
            continue
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != digest:
            raise ValueError(
                f"{file} is damaged: its SHA-256 is {found[:12]}..., the hub sent {digest[:12]}...; delete "
                "it and download it again."
            )
