"""Times the conversion of a 7B language model in both directions against plain copies of its files.

    python -m benchmarks.conversion [--folder=FOLDER] [--layers=32]

Writes random bfloat16 weights: 13.5 GB with 32 layers. FOLDER needs four times that much free disk space.
Then times four commands: a copy, `to-jax`, `to-torch` and a second copy. Each runs in its own process and
reads files that are not in the page cache.

Prints one JSON object: seconds, MB/s and peak memory of each command, the ratios of the conversions' speed to
that of the copies, and whether the tensors after both conversions equal the original bit for bit. All files
are removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.checkpoint.json_files import write_json
from dreamllm_jax.checkpoint.safetensors_files import write_sharded
from dreamllm_jax.checkpoint.tensors import DTYPES, Shape, Tensor, row_ranges
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.convert.config_files import llama_json
from dreamllm_jax.convert.weights import read_weights

ROOT = Path(__file__).resolve().parent.parent
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"
# Runs a command and prints its time and peak memory. The time includes flushing what it wrote to the disk.
TIMED_COMMAND = """
import json, os, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
os.sync()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"code": code, "seconds": time.perf_counter() - start, "peak": peak}))
"""


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """A lazy tensor of normally distributed random numbers, generated in pieces as they are written."""

    origin: str
    shape: Shape
    dtype: np.dtype = DTYPES["BF16"]
    row_readable = True

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        rng = np.random.default_rng((zlib.crc32(self.origin.encode()), first))
        shape = (last - first, *self.shape[1:])
        return (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(self.dtype)


def write_model(folder: Path, layers: int) -> int:
    """Writes a LLaMA-7B folder in transformers' format and returns the size of its tensors in bytes."""
    config = LlamaConfig(num_hidden_layers=layers)
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (config.vocab_size, width)}
    folder.mkdir()
    write_sharded(folder, "model", {name: RandomTensor(name, shape) for name, shape in shapes.items()})
    write_json(folder / "config.json", llama_json(config, "bfloat16"))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def drop_from_page_cache(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_command(command: list[str], source: Path, size: int) -> dict[str, float]:
    """Runs a command that reads `source` and returns its seconds, MB/s and peak memory in GiB.

    Raises:
      RuntimeError: the command failed.
    """
    drop_from_page_cache(source)
    program = [sys.executable, "-c", TIMED_COMMAND]
    completed = subprocess.run([*program, *command], capture_output=True, text=True, cwd=ROOT)
    result = json.loads(completed.stdout)
    if result["code"]:
        raise RuntimeError(f"{' '.join(command)} failed: {completed.stderr[-2000:]}")
    seconds = result["seconds"]
    return {
        "seconds": round(seconds, 1),
        "MB/s": round(size / 1e6 / seconds, 1),
        "peak_GiB": round(result["peak"] / 2**30, 2),
    }


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Returns whether two checkpoints hold the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(
        a.shape == theirs[name].shape
        and a.dtype == theirs[name].dtype
        and all(
            np.array_equal(a.read(*ends).view(np.uint16), theirs[name].read(*ends).view(np.uint16))
            for ends in row_ranges(a, 0, a.shape[0])
        )
        for name, a in ours.items()
    )


def measure(folder: Path, layers: int) -> dict[str, object]:
    """Runs the comparison inside `folder` and returns the results by step."""
    start = time.perf_counter()
    size = write_model(folder / "model", layers)
    print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    tool = [sys.executable, str(ROOT / "tools" / "convert_weights.py")]
    steps = {
        "copy": ([sys.executable, "-c", COPY], "model", "copy"),
        "to-jax": ([*tool, "to-jax", "--quiet"], "model", "jax"),
        "to-torch": ([*tool, "to-torch", "--quiet"], "jax", "torch"),
        "copy again": ([sys.executable, "-c", COPY], "model", "copy"),
    }
    results: dict[str, Any] = {"bytes": size}
    for name, (command, source, target) in steps.items():
        shutil.rmtree(folder / target, ignore_errors=True)
        command = [*command, str(folder / source), str(folder / target)]
        results[name] = time_command(command, folder / source, size)
        print(name, results[name], file=sys.stderr, flush=True)
    copies = [results[name]["MB/s"] for name in ("copy", "copy again")]
    for name in ("to-jax", "to-torch"):
        results[f"{name} / copy"] = round(results[name]["MB/s"] / (sum(copies) / 2), 2)
    results["same_bits"] = same_bits(read_weights(folder / "model"), read_weights(folder / "torch"))
    return results


def main() -> None:
    """Parses the command line and prints the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: temporary)")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(measure(Path(folder), arguments.layers), indent=1))


if __name__ == "__main__":
    main()
