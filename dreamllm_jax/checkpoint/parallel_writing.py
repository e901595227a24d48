"""Writes safetensors shards from all processes at once.

Every process writes some of the files. An array that is divided among processes is gathered on the devices,
chunk by chunk, by all of them; only the process that writes its file copies the chunk to the host. Every
other tensor (in a file, in memory, or replicated) is read by its writer alone.

The gathers are collectives, so all processes run them in one order. Chunks of the different writers alternate
in it, and each process writes in a thread of its own: while process 0 writes its first chunk, process 1
already receives its own.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dreamllm_jax.checkpoint.byte_ranges import Checksums
from dreamllm_jax.checkpoint.safetensors_files import (
    SHARD_BYTES,
    plan_shards,
    write_index,
    write_safetensors,
)
from dreamllm_jax.checkpoint.tensors import (
    DeliveredTensor,
    Tensor,
    chunk_ranges,
    num_bytes,
    spanning_array,
)
from dreamllm_jax.distributed import all_gather, gather_rows, is_main

# Gathered chunks that may wait for the writing thread.
_QUEUE_CHUNKS = 2
_POLL_SECONDS = 1.0


class _Gather(NamedTuple):
    """One collective read: rows start..stop of an array, and the process that needs them."""

    writer: int
    array: Any
    dtype: np.dtype
    start: int | None
    stop: int | None


def write_sharded_in_parallel(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES
) -> None:
    """Writes the files and the index of `write_sharded(..., with_checksums=True)` from all processes.

    All processes call this with the same tensors and one folder that they share. There is at least one file
    per process, if there are as many tensors. The index is written last, by process 0.

    Raises:
      OSError: this process cannot write into the folder.
    """
    count, index = jax.process_count(), jax.process_index()
    total = sum(num_bytes(tensor) for tensor in tensors.values())
    files = plan_shards(stem, tensors, min(limit, max(1, total // count)))
    writers = assign_writers(files, count)
    handoff = _Handoff()
    with ThreadPoolExecutor(1) as pool:
        own = {file: files[file] for file in files if writers[file] == index}
        writing = pool.submit(_write_files, folder, own, handoff)
        try:
            for gather in _gathers(files, writers, count):
                rows = gather_rows(gather.array, gather.start, gather.stop)
                if gather.writer == index:
                    handoff.put(np.asarray(rows).astype(gather.dtype, copy=False), writing)
                else:
                    rows.block_until_ready()  # so that few chunks are in device memory at once
        except BaseException:
            handoff.cancel()
            raise
        checksums = writing.result()
    everyones = all_gather({name: [sums.block, sums.crcs] for name, sums in checksums.items()})
    if is_main():
        merged = {
            name: Checksums(block, tuple(crcs)) for part in everyones for name, (block, crcs) in part.items()
        }
        write_index(folder, stem, files, merged)


def assign_writers(files: Mapping[str, Mapping[str, Tensor]], count: int) -> dict[str, int]:
    """Returns the process that writes each file: the largest files first, each to the least loaded process.

    Files of 5, 4, 3 and 3 bytes go to processes 0, 1, 1 and 0.
    """
    sizes = {file: sum(num_bytes(tensor) for tensor in group.values()) for file, group in files.items()}
    loads, writers = [0] * count, {}
    for file in sorted(files, key=lambda file: -sizes[file]):
        writers[file] = loads.index(min(loads))
        loads[writers[file]] += sizes[file]
    return writers


def _gathers(
    files: Mapping[str, Mapping[str, Tensor]], writers: Mapping[str, int], count: int
) -> Iterator[_Gather]:
    """Yields the collective reads in the order in which all processes run them: one per writer in turn."""
    by_writer: list[list[_Gather]] = [[] for _ in range(count)]
    for file, group in files.items():
        for tensor in group.values():
            array = spanning_array(tensor)
            if array is not None:
                by_writer[writers[file]] += [
                    _Gather(writers[file], array, tensor.dtype, *rows) for rows in chunk_ranges(tensor)
                ]
    for turn in itertools.zip_longest(*by_writer):
        yield from (gather for gather in turn if gather is not None)


def _write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], handoff: _Handoff
) -> dict[str, Checksums]:
    """Writes this process's files, in order, and returns the checksums of their tensors."""
    checksums: dict[str, Checksums] = {}
    for file, group in files.items():
        tensors = {
            name: tensor if spanning_array(tensor) is None else DeliveredTensor(tensor, handoff.get)
            for name, tensor in group.items()
        }
        checksums |= write_safetensors(folder / file, tensors)
    return checksums


class _Handoff:
    """Passes gathered chunks from the main thread to the writing thread."""

    def __init__(self) -> None:
        self._chunks: queue.Queue[np.ndarray] = queue.Queue(maxsize=_QUEUE_CHUNKS)
        self._cancelled = threading.Event()

    def put(self, chunk: np.ndarray, writing: Future) -> None:
        """Waits for room; raises the error of the writing thread if it has failed."""
        while True:
            try:
                return self._chunks.put(chunk, timeout=_POLL_SECONDS)
            except queue.Full:
                if writing.done():
                    writing.result()
                    raise AssertionError("the writing thread ended before the last chunk") from None

    def get(self) -> np.ndarray:
        """Waits for the next chunk."""
        while True:
            try:
                return self._chunks.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._cancelled.is_set():
                    raise RuntimeError("gathering the parameters has failed") from None

    def cancel(self) -> None:
        """Makes the writing thread end with an error."""
        self._cancelled.set()
