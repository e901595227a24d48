"""Files that were downloaded from the Hugging Face hub, against the digests that it recorded beside them.

safetensors has no checksums of its own: where huggingface_hub left the SHA-256 of a file, a flipped bit in it
is found out; elsewhere only the file's structure can be checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def recorded_digest(file: Path) -> str | None:
    """The SHA-256 of what the hub sent as `file`, where that is known.

    In the hub's cache a file is a link to `blobs/<digest>`; a download into a folder writes
    `.cache/huggingface/download/<name>.metadata`, which no longer counts once the file was written anew.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    for folder in file.parents:
        record = folder / ".cache" / "huggingface" / "download" / f"{file.relative_to(folder)}.metadata"
        if record.is_file():
            lines = record.read_text(encoding="utf-8").split("\n")
            known = len(lines) >= 3 and _SHA256.fullmatch(lines[1]) is not None
            return lines[1] if known and file.stat().st_mtime <= float(lines[2]) + 1 else None
    return None


def check_downloads(files: Iterable[Path]) -> None:
    """Compares every file whose digest is recorded.

    Raises:
      ValueError: one that is not what the hub sent, by name.
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
