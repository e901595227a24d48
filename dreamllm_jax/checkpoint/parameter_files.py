"""The converted form on disk: our parameter paths in safetensors shards, whole or absent.

A folder of it holds `params*.safetensors`, `params.safetensors.index.json` (where each parameter is, and
its checksum; written last, so that a folder without it is incomplete) and what the caller adds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Sharding

from dreamllm_jax.checkpoint.byte_ranges import Checksums
from dreamllm_jax.checkpoint.safetensors_files import SHARD_BYTES, read_index, read_safetensors, write_sharded
from dreamllm_jax.checkpoint.tensors import (
    DTYPES,
    ArrayTensor,
    Cast,
    Tensor,
    chunk_readers,
    contiguous,
    needs_all_processes,
    num_bytes,
    row_ranges,
)

Index = tuple[slice, ...]

STEM = "params"
INDEX = f"{STEM}.safetensors.index.json"

_DTYPE_ARGUMENTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def as_tensors(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Path -> tensor, of a nested or flat mapping of arrays (numpy, jax) or tensors."""
    flat = flatten_dict(dict(params), sep="/")
    return {
        path: value if isinstance(value, Tensor) else ArrayTensor(path, value) for path, value in flat.items()
    }


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """The tensors seen in another floating dtype ("float32", "bfloat16", ...; None leaves them)."""
    if dtype is None:
        return dict(tensors)
    if dtype not in _DTYPE_ARGUMENTS:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(_DTYPE_ARGUMENTS)}.")
    to = DTYPES[_DTYPE_ARGUMENTS[dtype]]
    return {path: Cast(tensor, to) for path, tensor in tensors.items()}


def save_params(
    folder: str | Path,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes parameters (nested dicts of arrays, or path -> tensor) into `folder`, streaming.

    Arrays on devices are fetched one at a time. Existing parameters there are replaced; an
    interrupted call leaves a folder that `open_params` refuses. Use it inside `new_folder` to make
    the whole folder appear at once.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = cast(as_tensors(params), dtype)
    total = sum(num_bytes(t) for t in tensors.values())
    check_disk_space(folder, total)
    for old in [folder / INDEX, *folder.glob(f"{STEM}*.safetensors")]:
        old.unlink(missing_ok=True)
    with progress_bar(total, f"writing {folder.name}", progress) as step:
        write_sharded(folder, STEM, tensors, shard_bytes, step, always_index=True)


def read_along(params: Mapping[str, Any]) -> None:
    """What the other processes do while process 0 calls `save_params`: their share of the reading."""
    for tensor in as_tensors(params).values():
        if needs_all_processes(tensor):
            for read in chunk_readers(tensor):
                read()


def open_params(folder: str | Path) -> dict[str, Tensor]:
    """Path -> tensor of a converted folder, unread; each is verified against its checksum when read.

    Raises:
      ValueError: not a converted folder, an incomplete or a damaged one.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is not a converted model (no {INDEX}); give a folder written by save_pretrained or by "
            "tools/convert_weights.py to-jax."
        )
    weight_map = read_index(folder / INDEX)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    known = index["checksums"] if "checksums" in index else {}
    checksums = {path: Checksums(block, tuple(crcs)) for path, (block, crcs) in known.items()}
    files = {name: read_safetensors(folder / name, checksums) for name in sorted(set(weight_map.values()))}
    absent = [path for path, name in weight_map.items() if path not in files[name]]
    if absent:
        raise ValueError(
            f"{folder} is damaged: {', '.join(absent[:5])} not in the shards that {INDEX} names."
        )
    return {path: files[name][path] for path, name in weight_map.items()}


def read_blocks(tensor: Tensor, indices: Sequence[Index]) -> list[np.ndarray]:
    """The blocks of a tensor that `indices` (slices of every axis) ask for.

    What several blocks share is read once, a few rows at a time where rows can be read apart.
    """
    if not tensor.shape:
        return [tensor.read() for _ in indices]
    spans = [[s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)] for index in indices]
    blocks = [np.empty([stop - start for start, stop in span], tensor.dtype) for span in spans]
    first, last = min(span[0][0] for span in spans), max(span[0][1] for span in spans)
    for start, stop in row_ranges(tensor, first, last):
        rows = contiguous(tensor.read(start, stop))
        for block, ((low, high), *others) in zip(blocks, spans, strict=True):
            begin, end = max(low, start), min(high, stop)
            if begin < end:
                part = (slice(begin - start, end - start), *(slice(*other) for other in others))
                block[begin - low : end - low] = rows[part]
    return blocks


def to_device(value: Any, sharding: Sharding, dtype: Any = None) -> jax.Array:
    """A tensor or an array as a jax.Array of its own; `dtype` casts it.

    Of what is not yet on devices, this process reads only what its own devices need.
    """
    if isinstance(value, jax.Array):
        return jax.device_put(value if dtype is None else value.astype(dtype), sharding, may_alias=False)
    tensor = value if isinstance(value, Tensor) else ArrayTensor("an array", value)
    if dtype is not None:
        tensor = Cast(tensor, np.dtype(dtype))
    indices = sharding.addressable_devices_indices_map(tensor.shape)
    distinct = {_ends(index): index for index in indices.values()}
    blocks = dict(zip(distinct, read_blocks(tensor, list(distinct.values())), strict=True))
    parts = [
        jax.device_put(blocks[_ends(index)], device, may_alias=False) for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(tensor.shape, sharding, parts)


def _ends(index: Index) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((cut.start, cut.stop) for cut in index)


@contextlib.contextmanager
def progress_bar(total: int, label: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function to report written bytes to; shows them with their rate on standard error."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield bar.update


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises ValueError where the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} needs {needed / 2**30:.1f} GiB of disk space, and {free / 2**30:.1f} GiB are free; "
            "make room or choose another place."
        )
