"""Reads and writes the safetensors format lazily.

The `safetensors` package writes a file only from tensors that are all in memory. Here values are streamed in
chunks, because one stacked parameter of a 7B model is larger than the memory of many machines.

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
from typing import Any

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
    """Returns the tensors of one file, unread.

    `checksums`, by name, are verified when a tensor is read. The format itself has none.

    Raises:
      ValueError: the file is truncated, damaged, or of another format.
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
    """Computes the checksums of a tensor while its bytes are written in chunks of any size.

    A block is complete rows of the first axis: about 1 MiB of them, or one row. Rows can thus be verified
    without reading others.
    """

    def __init__(self, tensor: Tensor):
        row = num_bytes(tensor) // max(tensor.shape[0] if tensor.shape else 1, 1)
        self.block = max(row * -(-(2**20) // max(row, 1)), 1)
        self.crcs: list[int] = []
        self.filled = 0

    def update(self, data: memoryview) -> None:
        """Adds the next bytes."""
        while len(data):
            if self.filled == 0:
                self.crcs.append(0)
            part = data[: self.block - self.filled]
            self.crcs[-1] = zlib.crc32(part, self.crcs[-1])
            self.filled = (self.filled + len(part)) % self.block
            data = data[len(part) :]

    def result(self) -> Checksums:
        """Returns the checksums of all bytes so far."""
        return Checksums(self.block, tuple(self.crcs))


def write_safetensors(
    file: str | Path,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Checksums]:
    """Streams `tensors` into one file, in their order, and returns the checksums of each.

    `progress` is called with the number of bytes of each chunk. The file appears under its name only when it
    is complete.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
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
        for number, chunk in stream_chunks(tensors.values()):
            data = chunk.reshape(-1).view("u1").data if chunk.size else memoryview(b"")
            out.write(data)
            sums[names[number]].update(data)
            progress(len(data))
    return {name: done.result() for name, done in sums.items()}


def plan_shards(
    stem: str, tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES
) -> dict[str, dict[str, Tensor]]:
    """Returns file name -> its tensors, in order; a file has at most `limit` bytes, or one larger tensor.

    One file is called `stem.safetensors`, several are numbered as transformers does. With a limit of 10 bytes
    and tensors of 4, 4 and 8 bytes, `a-00001-of-00002.safetensors` gets the first two, and
    `a-00002-of-00002.safetensors` the third.
    """
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + num_bytes(tensor) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += num_bytes(tensor)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def write_index(
    folder: Path,
    stem: str,
    files: Mapping[str, Mapping[str, Tensor]],
    checksums: Mapping[str, Checksums] | None = None,
) -> None:
    """Writes `stem.safetensors.index.json`: the file of each tensor and, if given, its checksums."""
    total = sum(num_bytes(tensor) for group in files.values() for tensor in group.values())
    weight_map = {name: file for file, group in files.items() for name in group}
    index: dict[str, object] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if checksums is not None:
        index["checksums"] = {name: dataclasses.astuple(checksums[name]) for name in weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_sharded(
    folder: str | Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    limit: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda count: None,
    with_checksums: bool = False,
) -> None:
    """Writes `stem.safetensors`, or numbered shards with an index, as transformers does.

    `with_checksums` writes an index with the checksums of all tensors, even for a single shard.
    """
    folder = Path(folder)
    files, checksums = plan_shards(stem, tensors, limit), {}
    for file, group in files.items():
        checksums |= write_safetensors(folder / file, group, progress)
    if len(files) > 1 or with_checksums:
        write_index(folder, stem, files, checksums if with_checksums else None)


def read_index(index: str | Path) -> dict[str, str]:
    """Returns the shard of each tensor, from a `*.index.json`. The shards are files in the same folder.

    Raises:
      ValueError: the index is damaged, names missing shards (all are listed), or points to another folder.
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
