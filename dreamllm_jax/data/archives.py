"""Images by name, from a folder or from zips and tars, without unpacking them.

Opening an archive reads its index; an image is then one seek and one read away.
"""

from __future__ import annotations

import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Member(NamedTuple):
    """A file within an archive; `offset` is that of its bytes (tar) or of its header (zip)."""

    name: str
    offset: int
    size: int
    zipped: bool = False


@runtime_checkable
class Images(Protocol):
    """Images by name."""

    def find(self, name: str) -> bytes | Path:
        """Returns the file's bytes or its path; empty bytes (a broken image) if the file does not exist."""
        ...


def members(path: Path) -> Iterator[Member]:
    """Returns the files of a zip or tar, in order; of a truncated tar those before the break, with a warning.

    Raises:
      ValueError: the file is neither, or a compressed tar.
    """
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a complete zip ({error}); download it again.") from error
        yield from (
            Member(i.filename, i.header_offset, i.compress_size, True) for i in infos if not i.is_dir()
        )
    elif path.suffix == ".tar":
        yield from _tar_members(path)
    else:
        raise ValueError(f"{path} is not a .zip or .tar; unpack or rename it, or correct the path.")


def _tar_members(path: Path) -> Iterator[Member]:
    count, size = 0, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                vars(archive)["members"] = []  # the list would hold every header
                if info.isfile() and info.offset_data + info.size <= size:
                    count += 1
                    yield Member(info.name, info.offset_data, info.size)
    except tarfile.TarError as error:
        if not count:
            raise ValueError(
                f"{path} is not an uncompressed tar ({error}); unpack it, or download it again."
            ) from error
        warnings.warn(
            f"{path} is truncated after {count} files ({error}); the rest is left out.", stacklevel=2
        )


def read_member(path: Path, member: Member) -> bytes:
    """Returns the bytes of one file of an archive.

    Raises:
      ValueError: a zip's entry is damaged, or compressed by an unsupported method.
    """
    with open(path, "rb") as file:
        file.seek(member.offset)
        if not member.zipped:
            return file.read(member.size)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{path}: the entry {member.name!r} is damaged.")
        method, name, extra = struct.unpack_from("<H16xHH", header, 8)
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(member.size)
    if method == zipfile.ZIP_STORED:
        return data
    if method != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{path}: the entry {member.name!r} is compressed by method {method}; use deflate.")
    try:
        return zlib.decompress(data, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise ValueError(f"{path}: the entry {member.name!r} is damaged ({error}).") from error


def open_images(paths: Sequence[Path]) -> Images:
    """Opens a folder of images, or zips and tars of them.

    Raises:
      ValueError: several folders are given, or a file is not a zip or tar.
    """
    if paths[0].is_dir():
        if len(paths) > 1:
            raise ValueError(
                f"images: {paths[0]} is a folder, and other paths are given too; give one folder or archives."
            )
        return ImageFolder(paths[0])
    return ImageArchives(paths)


class ImageFolder:
    """Images in a folder and its subfolders, by their path within it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, name: str) -> bytes | Path:
        path = self.folder / name.lstrip("/")
        if path.is_file():
            return path
        # Downloaders may save an image under another suffix than the one in the record.
        others = (path.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)
        return next((other for other in others if other.is_file()), path)


class ImageArchives:
    """Images in zips and tars, by their path within the archive, or else by their name without suffix."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._members: dict[str, tuple[int, Member]] = {}
        self._bare: dict[str, str] = {}
        for at, path in enumerate(tqdm(self.paths, "index", unit="file", disable=len(self.paths) < 10)):
            for member in members(path):
                self._members.setdefault(member.name.removeprefix("./"), (at, member))
        for name in self._members:
            self._bare.setdefault(Path(name).stem, name)

    def __len__(self) -> int:
        return len(self._members)

    def find(self, name: str) -> bytes | Path:
        key = name.removeprefix("./").lstrip("/")
        if key not in self._members:
            stem = Path(key).stem
            if stem not in self._bare:
                return b""
            key = self._bare[stem]
        at, member = self._members[key]
        try:
            return read_member(self.paths[at], member)
        except ValueError:
            return b""
