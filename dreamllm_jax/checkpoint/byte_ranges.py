"""Byte ranges of weight files, read on demand and verified if the format has checksums."""

from __future__ import annotations

import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np

# The size of the chunks in which data is read, transformed and written.
CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Checksums:
    """The CRC-32 of consecutive blocks of `block` bytes; the last block may be shorter."""

    block: int
    crcs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """A range of bytes in a file, with checksums if the format has them."""

    file: Path
    offset: int
    size: int
    checksums: Checksums | None = None
    verified: set[int] = dataclasses.field(default_factory=set)

    def __post_init__(self):
        if self.offset + self.size > os.path.getsize(self.file):
            raise ValueError(
                f"{self.file} is truncated: it ends at byte {os.path.getsize(self.file)}, and its contents "
                f"end at byte {self.offset + self.size}; download or copy it again."
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns bytes start..stop of the range as uint8. The blocks that contain them are verified once.

        Raises:
          ValueError: the file cannot be read, is truncated, or does not match its checksums.
        """
        if self.checksums is None:
            return self._bytes(start, stop)
        block = self.checksums.block
        touched = range(start // block, -(-stop // block))
        if self.verified.issuperset(touched):
            return self._bytes(start, stop)
        low, high = touched.start * block, min(touched.stop * block, self.size)
        if high - low > stop - start + CHUNK_BYTES:  # a small part of a large block
            for i in touched:
                self._check(i, self._crc_of(i * block, min(i * block + block, self.size)))
            return self._bytes(start, stop)
        data = self._bytes(low, high)
        for i in touched:
            self._check(i, zlib.crc32(data[i * block - low : (i + 1) * block - low].data))
        return data[start - low : stop - low]

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        try:
            data = np.fromfile(self.file, np.uint8, stop - start, offset=self.offset + start)
        except OSError as error:
            raise ValueError(f"{self.file} cannot be read: {error}.") from error
        if data.size != stop - start:
            raise ValueError(f"{self.file} is truncated; download or copy it again.")
        return data

    def _crc_of(self, start: int, stop: int) -> int:
        crc = 0
        for at in range(start, stop, CHUNK_BYTES):
            crc = zlib.crc32(self._bytes(at, min(at + CHUNK_BYTES, stop)).data, crc)
        return crc

    def _check(self, block: int, crc: int) -> None:
        assert self.checksums is not None
        if crc != self.checksums.crcs[block]:
            start = self.offset + block * self.checksums.block
            raise ValueError(
                f"{self.file} is damaged: the data at byte {start} does not match its checksum; "
                "download or copy it again."
            )
        self.verified.add(block)
