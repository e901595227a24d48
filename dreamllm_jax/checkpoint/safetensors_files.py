"""The safetensors format, lazily in both directions.

The `safetensors` package writes a shard only from tensors that are all in memory; here values are
streamed piece by piece, since one stacked leaf of a 7B model is larger than many machines' memory.

Format: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from dreamllm_jax.atomic import atomic_write
from dreamllm_jax.checkpoint.byte_ranges import ByteRange, Checksums
from dreamllm_jax.checkpoint.json_files import write_json
from dreamllm_jax.checkpoint.tensors import (
    DTYPE_NAMES,
    DTYPES,
    FileTensor,
    Tensor,
    num_bytes,
    stream_chunks,
)

MAX_HEADER_BYTES = 100_000_000
SHARD_BYTES = 5 * 10**9


def read_safetensors(file: str | Path, checksums: Mapping[str, Checksums] | None = None) -> dict[str, Tensor]:
    """The tensors of one file, unread.

    `checksums` (by name), where given, are verified when a tensor is read: the format itself
    has none.

    Raises:
      ValueError: a truncated, damaged or foreign file, by name.
    """
    file = Path(file)
    size = os.path.getsize(file)
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file, or its beginning is damaged.")
        if 8 + length > size:
            raise ValueError(f"{file} is truncated in its header; download or copy it again.")
        header = opened.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if 8 + length + end != size:
            fault = "is truncated" if 8 + length + end > size else "has extra bytes at its end"
            raise ValueError(
                f"{file} {fault}: {size} bytes, expected {8 + length + end}; download or copy it again."
            )
        tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            known = checksums[name] if checksums and name in checksums else None
            storage = ByteRange(file, 8 + length + first, last - first, known)
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{file}: tensor {name} has the dtype {entry['dtype']}, which is not supported."
                )
            tensor = FileTensor(name, storage, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if num_bytes(tensor) != last - first:
                raise ValueError(
                    f"{file}: tensor {name} has {last - first} bytes for {tensor.shape}; it is damaged."
                )
            tensors[name] = tensor
        return tensors
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged: its header cannot be read ({error}).") from error


class Checksummer:
    """Collects the checksums of a tensor while its bytes are written in pieces of any size.

    A block is whole rows of the first axis, about a MiB or one row, so that rows can be verified
    without reading others.
    """

    def __init__(self, tensor: Tensor):
        row = num_bytes(tensor) // max(tensor.shape[0] if tensor.shape else 1, 1)
        self.block = max(row * -(-(2**20) // max(row, 1)), 1)
        self.crcs: list[int] = []
        self.filled = 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes."""
        while len(data):
            if self.filled == 0:
                self.crcs.append(0)
            part = data[: self.block - self.filled]
            self.crcs[-1] = zlib.crc32(part, self.crcs[-1])
            self.filled = (self.filled + len(part)) % self.block
            data = data[len(part) :]

    def result(self) -> Checksums:
        """The checksums of all bytes so far."""
        return Checksums(self.block, tuple(self.crcs))


def write_safetensors(
    file: str | Path,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Checksums]:
    """Streams `tensors` into one file, in their order; returns each one's checksums.

    `progress` is called with the number of bytes after each piece. The file appears under its name
    only when it is complete.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + num_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = {name: Checksummer(tensor) for name, tensor in tensors.items()}
    names = list(tensors)
    with atomic_write(file) as beside, beside.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for number, piece in stream_chunks(tensors.values()):
            data = memoryview(piece.reshape(-1).view("u1")) if piece.size else memoryview(b"")
            out.write(data)
            sums[names[number]].update(data)
            progress(len(data))
    return {name: done.result() for name, done in sums.items()}


def shards(tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Splits tensors, in order, into groups of at most `limit` bytes (or of one larger tensor)."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + num_bytes(tensor) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += num_bytes(tensor)
    return groups


def write_sharded(
    folder: str | Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    limit: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda count: None,
    always_index: bool = False,
) -> dict[str, Checksums]:
    """Writes `stem.safetensors`, or numbered shards and `stem.safetensors.index.json`, as transformers does.

    Returns the checksums. With `always_index` one shard has an index too.
    """
    folder = Path(folder)
    groups = shards(tensors, limit)
    weight_map, checksums = {}, {}
    for i, group in enumerate(groups):
        name = (
            f"{stem}.safetensors"
            if len(groups) == 1
            else f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        checksums.update(write_safetensors(folder / name, group, progress))
        weight_map.update(dict.fromkeys(group, name))
    if len(groups) > 1 or always_index:
        total = sum(num_bytes(t) for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if always_index:
            index["checksums"] = {name: dataclasses.astuple(sums) for name, sums in checksums.items()}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    return checksums


def read_index(index: str | Path) -> dict[str, str]:
    """The shard of each tensor, from a `*.index.json`; shards are plain names beside it, and exist.

    Raises:
      ValueError: a damaged index, missing shards (all named), or one that points elsewhere.
    """
    index = Path(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index} is not a weight index: {error}.") from error
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} points outside its folder: {name!r}; refused.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index.parent} is incomplete: {', '.join(absent)} missing; download the rest.")
    return weight_map
