"""Parameters in a folder of safetensors shards, under the project's own parameter paths.

The folder holds `params*.safetensors` and `params.safetensors.index.json`, which has the file and the
checksums of each parameter. The index is written last: a folder without it is incomplete.
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
    contiguous,
    num_bytes,
    row_ranges,
)

Index = tuple[slice, ...]

STEM = "params"
INDEX_FILE = f"{STEM}.safetensors.index.json"

_DTYPE_ARGUMENTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def as_tensors(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns path -> tensor for a nested or flat mapping of arrays (numpy, jax) or tensors."""
    flat = flatten_dict(dict(params), sep="/")
    return {
        path: value if isinstance(value, Tensor) else ArrayTensor(path, value) for path, value in flat.items()
    }


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Returns the tensors converted to another floating dtype ("float32", "bfloat16", ...; None: unchanged).

    Raises:
      ValueError: the dtype is unknown.
    """
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
    """Streams parameters (nested dicts of arrays, or path -> tensor) into `folder`, from this process alone.

    Existing parameters in the folder are replaced. An interrupted call leaves a folder that `open_params`
    refuses; use `new_folder` to make the folder appear only when it is complete.

    Raises:
      ValueError: an unknown dtype, or too little disk space.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = cast(as_tensors(params), dtype)
    total = sum(num_bytes(t) for t in tensors.values())
    check_disk_space(folder, total)
    for old in [folder / INDEX_FILE, *folder.glob(f"{STEM}*.safetensors")]:
        old.unlink(missing_ok=True)
    with progress_bar(total, f"writing {folder.name}", progress) as step:
        write_sharded(folder, STEM, tensors, shard_bytes, step, with_checksums=True)


def open_params(folder: str | Path) -> dict[str, Tensor]:
    """Returns path -> tensor of a folder of parameters, unread. Checksums are verified when a tensor is read.

    Raises:
      ValueError: the folder has no index, is incomplete, or is damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(
            f"{folder} is not a converted model (no {INDEX_FILE}); give a folder written by save_pretrained "
            "or by dreamllm convert to-jax."
        )
    weight_map = read_index(folder / INDEX_FILE)
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    known = index["checksums"] if "checksums" in index else {}
    checksums = {path: Checksums(block, tuple(crcs)) for path, (block, crcs) in known.items()}
    files = {name: read_safetensors(folder / name, checksums) for name in sorted(set(weight_map.values()))}
    absent = [path for path, name in weight_map.items() if path not in files[name]]
    if absent:
        raise ValueError(
            f"{folder} is damaged: {', '.join(absent[:5])} not in the shards that {INDEX_FILE} names."
        )
    return {path: files[name][path] for path, name in weight_map.items()}


def read_blocks(tensor: Tensor, indices: Sequence[Index]) -> list[np.ndarray]:
    """Returns the blocks of a tensor that `indices` select; an index has one slice per axis.

    Rows that several blocks share are read once, in chunks if the tensor is row-readable. For a tensor of
    shape [4, 6] divided over four devices as 2 x 2, rows 0..1 are read once for the two upper blocks.
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
    """Returns a new jax.Array with the values of a tensor or an array; `dtype` converts them.

    Of values that are not on devices yet, this process reads only the rows that its own devices hold.
    """
    if isinstance(value, jax.Array):
        return jax.device_put(value if dtype is None else value.astype(dtype), sharding, may_alias=False)
    tensor = value if isinstance(value, Tensor) else ArrayTensor("an array", value)
    if dtype is not None:
        tensor = Cast(tensor, np.dtype(dtype))
    indices: Any = sharding.addressable_devices_indices_map(tensor.shape)
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
    """Yields a function that takes the number of bytes written, and shows a progress bar if `shown`."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def report(count: int) -> None:
            bar.update(count)

        yield report


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises ValueError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} needs {needed / 2**30:.1f} GiB of disk space, and {free / 2**30:.1f} GiB are free; "
            "free some space, or choose another folder."
        )
