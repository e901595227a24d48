"""Times every implementation of attention beside the reference, in turns, and sees that they agree.

    python -m benchmarks.kernels [CASE ...] [--size=tiny|full] [--turns=N] [--topology=NAME] [--json=FILE]

For each case and implementation: milliseconds forward and with the backward pass (medians), the reference's
time by it (above 1: it is faster), the memory that the compiled backward pass needs beside its arguments and
results, and how far results and gradients are from those in float32, by how far the reference's are (by 1e-6
at least). CPUs compute in float32, GPUs and TPUs in bfloat16; the truth is `chunked` in float32, which the
tests hold to the reference. Turns go A B C C B A ...; compilation is not timed. `full` are the shapes of
LLaMA-7B, Stable Diffusion 2.1 and CLIP ViT-L/14; it is what an accelerator is measured with. The exit code
is 1 where an implementation is more than twice as far from the truth as the reference is.

With `--topology=v5e:2x2` (any that libtpu knows) nothing runs: the TPU's compiler, which needs no TPU, says
what memory each needs on one chip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.ops.attention import masks
from dreamllm_jax.ops.attention.chunked import chunked_attention
from dreamllm_jax.ops.attention.cudnn import cudnn_attention
from dreamllm_jax.ops.attention.reference import reference_attention
from dreamllm_jax.ops.attention.splash import splash_attention
from dreamllm_jax.sharding import make_mesh

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: rows, queries, keys, heads of both, their width; packed rows or pictures."""

    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    packed: bool = False


CASES = {
    "full": {
        "llama": Case(4, 2048, 2048, 32, 32, 128, packed=True),
        "llama, 8 key heads": Case(4, 2048, 2048, 32, 8, 128, packed=True),
        "llama, long": Case(1, 8192, 8192, 32, 32, 128, packed=True),
        "unet, 64 x 64": Case(16, 4096, 4096, 5, 5, 64),
        "unet, 32 x 32": Case(16, 1024, 1024, 10, 10, 64),
        "unet, dream queries": Case(16, 4096, 64, 5, 5, 64),
        "clip": Case(16, 257, 257, 16, 16, 64),
        "vae": Case(4, 4096, 4096, 1, 1, 512),
    },
    "tiny": {
        "llama": Case(4, 512, 512, 4, 4, 64, packed=True),
        "llama, long": Case(1, 2048, 2048, 4, 4, 64, packed=True),
        "unet, 32 x 32": Case(4, 1024, 1024, 2, 2, 64),
        "unet, dream queries": Case(4, 1024, 64, 2, 2, 64),
    },
}
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., jax.Array]]] = {
    "cpu": {"xla": reference_attention, "chunked": chunked_attention},
    "gpu": {"xla": reference_attention, "chunked": chunked_attention, "cudnn": cudnn_attention},
    "tpu": {"xla": reference_attention, "chunked": chunked_attention, "splash": splash_attention},
}
# What a kernel or a compiler says of shapes that it does not take, or that do not fit.
IMPOSSIBLE = (ValueError, NotImplementedError, RuntimeError)


def inputs(case: Case, dtype: Any) -> Arrays:
    """Queries, keys, values, the gradient that comes back, and the segments of packed rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    of_keys = (case.rows, case.keys, case.kv_heads, case.width)
    shape = (case.rows, case.queries, case.heads, case.width)
    shapes = (shape, of_keys, of_keys, shape)
    arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
    ends = jax.random.randint(keys[4], (case.rows, 1, 4), 1, case.queries)  # of four documents; then padding
    ids = (jnp.arange(case.queries)[None, :, None] >= ends).sum(-1) + 1
    return *arrays, jnp.where(ids == 5, 0, ids).astype(jnp.int32)


def compiled(function: Callable, case: Case, arrays: Arrays) -> tuple[Any, Any]:
    """The forward pass, and the one with the gradients of queries, keys and values."""

    def forward(q, k, v, _, ids):
        return function(q, k, v, masks.packed(ids) if case.packed else None)

    def both(q, k, v, back, ids):
        out, pull = jax.vjp(lambda *x: forward(*x, back, ids), q, k, v)
        return out, *pull(back)

    forward, both = (jax.jit(f).lower(*arrays).compile() for f in (forward, both))
    return forward, both


def distances(found: Arrays, truth: Arrays) -> list[float]:
    """Of the result and each gradient: norm of the difference by the norm."""
    pairs = zip(found, truth, strict=True)
    return [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]


def in_turns(runs: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    """Median milliseconds of each; the order is turned around every time."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for turn in range(turns):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def measure(case: Case, turns: int, dtype: Any) -> dict[str, dict[str, Any]]:
    """By implementation the figures, or {"impossible": why}."""
    arrays = inputs(case, dtype)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[Any, Callable[[], Any]] = {}
    wide = tuple(x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays)
    with jax.default_matmul_precision("highest"):
        truth = compiled(chunked_attention, case, wide)[1](*wide)
    far: dict[str, list[float]] = {}
    for name, function in IMPLEMENTATIONS[jax.default_backend()].items():
        try:
            forward, both = compiled(function, case, arrays)
            far[name] = distances(both(*arrays), truth)
        except IMPOSSIBLE as error:
            found[name] = {"impossible": str(error).splitlines()[0]}
            continue
        runs |= {(name, "forward"): lambda f=forward: f(*arrays), (name, "both"): lambda f=both: f(*arrays)}
        memory = both.memory_analysis().temp_size_in_bytes
        found[name] = {"memory_mib": memory / 2**20, "distances": far[name]}
    times = in_turns(runs, turns)
    for name in far:
        found[name] |= {
            "forward_ms": times[name, "forward"],
            "both_ms": times[name, "both"],
            "faster_forward": times["xla", "forward"] / times[name, "forward"],
            "faster_both": times["xla", "both"] / times[name, "both"],
            "relative_distance": max(a / max(b, 1e-6) for a, b in zip(far[name], far["xla"], strict=True)),
        }
    return found


def memory(case: Case, chip: Any) -> dict[str, dict[str, Any]]:
    """By implementation what the compiler for a described TPU says of it."""
    mesh = make_mesh(MeshConfig(data=1), [chip])
    place = NamedSharding(mesh, PartitionSpec())
    arrays = jax.eval_shape(lambda: inputs(case, jnp.bfloat16))
    arrays = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays)
    found: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        for name, function in IMPLEMENTATIONS["tpu"].items():
            try:
                both = compiled(function, case, arrays)[1]
            except IMPOSSIBLE as error:
                found[name] = {"impossible": str(error).splitlines()[0]}
                continue
            found[name] = {"memory_mib": both.memory_analysis().temp_size_in_bytes / 2**20}
    return found


def described(topology: str) -> Any:
    """One chip of a TPU that is not there."""
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5p-8")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def show(name: str, case: Case, found: dict[str, dict[str, Any]]) -> None:
    """One table of text."""
    print(f"{name}: {dataclasses.astuple(case)[:-1]}{', packed' if case.packed else ''}")
    for implementation, x in found.items():
        if "impossible" in x:
            print(f"  {implementation:8} impossible: {x['impossible']}")
            continue
        if "both_ms" not in x:
            print(f"  {implementation:8} {x['memory_mib']:9.1f} MiB", flush=True)
            continue
        print(
            f"  {implementation:8} {x['forward_ms']:9.2f} ms {x['faster_forward']:6.2f} x"
            f"   with backward {x['both_ms']:9.2f} ms {x['faster_both']:6.2f} x"
            f"   {x['memory_mib']:9.1f} MiB   distance {x['relative_distance']:.2f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--size", choices=tuple(CASES), default="tiny")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--topology", help="of TPUs; measure nothing, compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cases = CASES[options.size]
    if unknown := [name for name in options.cases if name not in cases]:
        parser.error(f"unknown: {', '.join(unknown)}; {options.size} has {', '.join(map(repr, cases))}")
    device = described(options.topology) if options.topology else jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    print(f"JAX {jax.__version__}, {device.device_kind}, {jnp.dtype(dtype).name}")
    results = {}
    for name in options.cases or cases:
        case = cases[name]
        results[name] = memory(case, device) if options.topology else measure(case, options.turns, dtype)
        show(name, cases[name], results[name])
    if options.json is not None:
        about = {"jax": jax.__version__, "device": device.device_kind, "dtype": jnp.dtype(dtype).name}
        options.json.write_text(json.dumps({"surroundings": about, "results": results}, indent=1) + "\n")
    measured = [x for found in results.values() for x in found.values() if "both_ms" in x]
    return int(any(x["relative_distance"] > 2 for x in measured))


if __name__ == "__main__":
    sys.exit(main())
