"""Describes a folder of weights in a few lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from dreamllm_jax.checkpoint.parameter_files import INDEX_FILE, open_params
from dreamllm_jax.checkpoint.tensors import Tensor, num_bytes
from dreamllm_jax.convert.recognize import open_checkpoint


def describe(
    path: str | Path, parts_dir: str | Path | None = None, prediction_type: str | None = None
) -> str:
    """Returns the kind, the parts with their parameters and dtypes, and what does not fit or is ignored.

    Raises:
      ValueError: the folder is unknown or damaged.
    """
    path = Path(path)
    if (path / INDEX_FILE).is_file():
        return "\n".join([f"{path}: saved model (dreamllm_jax)", *_parts(open_params(path))])
    source = open_checkpoint(path, parts_dir, prediction_type)
    params, report = source.params()
    return "\n".join([f"{path}: {source.kind}", *_parts(params), str(report)])


def _parts(params: Mapping[str, Tensor]) -> list[str]:
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in params.items():
        parts[name.split("/")[0]].append(tensor)
    lines = []
    for part, tensors in parts.items():
        count = sum(num_bytes(t) // t.dtype.itemsize for t in tensors)
        dtypes = ", ".join(sorted(Counter(str(t.dtype) for t in tensors)))
        size = sum(map(num_bytes, tensors)) / 1e6
        lines.append(f"  {part:<20} {count:>14,} parameters  {size:>10,.1f} MB  {dtypes}")
    return lines
