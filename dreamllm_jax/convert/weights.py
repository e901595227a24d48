"""Finds and opens the weight files of a folder, in any of the usual formats."""

from __future__ import annotations

from pathlib import Path

from dreamllm_jax.checkpoint.safetensors_files import read_index, read_safetensors
from dreamllm_jax.checkpoint.tensors import Tensor
from dreamllm_jax.convert.pickles import read_pickle

# The names that transformers and diffusers use, in order of preference.
MODEL_STEMS = ("model", "pytorch_model")
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")


def read_file(file: str | Path) -> dict[str, Tensor]:
    """Opens one `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file without reading its tensors."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; check the path.")
    return read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)[0]


def find_weights(folder: Path, stems: tuple[str, ...] = MODEL_STEMS) -> Path | None:
    """Returns the file (or the index of shards) with a folder's weights, or None if it has no weights."""
    for suffix in SUFFIXES:
        for stem in stems:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    return None


def read_weights(folder: str | Path, stems: tuple[str, ...] = MODEL_STEMS) -> dict[str, Tensor]:
    """Opens all tensors of a folder: one file, or the shards that an index names.

    Raises:
      ValueError: there are no weights, shards are missing, a tensor is in two shards, or the index names
        a tensor that no shard has; each is named.
    """
    folder = Path(folder)
    file = find_weights(folder, stems)
    if file is None:
        names = ", ".join(f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
        raise ValueError(f"{folder} has no weights; expected one of {names}.")
    if file.suffix != ".json":
        return read_file(file)
    weight_map = read_index(file)
    tensors: dict[str, Tensor] = {}
    twice: list[str] = []
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_file(folder / shard).items():
            if name in tensors:
                twice.append(f"{name} ({tensors[name].origin}; {tensor.origin})")
            tensors[name] = tensor
    absent = [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in tensors]
    if twice or absent:
        faults = [f"in two shards: {', '.join(twice[:20])}"] if twice else []
        faults += [f"named but absent: {', '.join(absent[:20])}"] if absent else []
        raise ValueError(f"{file}: {'; '.join(faults)}; the shards do not belong together.")
    return tensors
