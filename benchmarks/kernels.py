"""Times every implementation of attention against the reference and checks that they agree.

    python -m benchmarks.kernels [CASE ...] [--size=tiny|full] [--turns=N] [--topology=NAME] [--json=FILE]

For each case and implementation, prints:

- the median milliseconds of the forward pass, and of the forward and backward passes,
- the speedup over the reference (above 1: faster than the reference),
- the temporary memory of the compiled forward and backward passes (arguments and results are not counted),
- the error ratio: the error of its outputs and gradients, divided by the error of the reference's, or by 1e-6
  where that is smaller. The largest ratio is printed.

Errors are relative to `chunked` in float32, which the tests compare with the reference. CPUs compute in
float32, GPUs and TPUs in bfloat16. Implementations take turns in the order A B C C B A ...; compilation is
not timed. `--size=full` has the shapes of LLaMA-7B, Stable Diffusion 2.1 and CLIP ViT-L/14; use it on an
accelerator. The exit code is 1 if an error ratio is above 2.

With `--topology=v5e:2x2`, or another topology that libtpu knows, nothing is run. Instead, the TPU compiler,
which does not need a TPU, reports the memory that each implementation needs on one chip.
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

Arrays = tuple[Any, ...]  # or their shapes


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of one attention call.

    `width` is the width of one head. `packed` rows hold several documents and have a causal mask; other rows
    have no mask.
    """

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
# What kernels and compilers raise for shapes that they do not support or that do not fit into memory.
UNSUPPORTED = (ValueError, NotImplementedError, RuntimeError)


def inputs(case: Case, dtype: Any) -> Arrays:
    """Returns random queries, keys, values and output gradient, and the segment ids of packed rows."""
    keys = jax.random.split(jax.random.key(0), 5)
    kv_shape = (case.rows, case.keys, case.kv_heads, case.width)
    shape = (case.rows, case.queries, case.heads, case.width)
    shapes = (shape, kv_shape, kv_shape, shape)
    arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=False)]
    # Each row has up to four documents, which end at random positions; padding follows.
    ends = jax.random.randint(keys[4], (case.rows, 1, 4), 1, case.queries)
    ids = (jnp.arange(case.queries)[None, :, None] >= ends).sum(-1) + 1
    return *arrays, jnp.where(ids == 5, 0, ids).astype(jnp.int32)


def compile_passes(function: Callable, case: Case, arrays: Arrays) -> tuple[Any, Any]:
    """Returns two compiled functions: the forward pass, and the forward and backward passes.

    The second returns the output and the gradients of queries, keys and values.
    """

    def forward(q, k, v, _, ids):
        if not case.packed:
            return function(q, k, v, None)
        return function(q, k, v, masks.packed(ids, (ids[..., None] == jnp.arange(1, 5)).sum(1)))

    def forward_backward(q, k, v, output_gradient, ids):
        out, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, output_gradient, ids), q, k, v)
        return out, *vjp(output_gradient)

    forward, forward_backward = (jax.jit(f).lower(*arrays).compile() for f in (forward, forward_backward))
    return forward, forward_backward


def relative_errors(found: Arrays, truth: Arrays) -> list[float]:
    """Returns ||found - truth|| / ||truth|| for the output and for each gradient."""
    pairs = zip(found, truth, strict=True)
    return [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]


def time_in_turns(runs: dict[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    """Returns the median milliseconds of each function; every other turn runs them in reverse order."""
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
    """Returns the figures of each implementation, or {"error": message} if it cannot compute the case."""
    arrays = inputs(case, dtype)
    found: dict[str, dict[str, Any]] = {}
    runs: dict[Any, Callable[[], Any]] = {}
    arrays_float32 = tuple(x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays)
    with jax.default_matmul_precision("highest"):
        truth = compile_passes(chunked_attention, case, arrays_float32)[1](*arrays_float32)
    errors: dict[str, list[float]] = {}
    for name, function in IMPLEMENTATIONS[jax.default_backend()].items():
        try:
            forward, forward_backward = compile_passes(function, case, arrays)
            errors[name] = relative_errors(forward_backward(*arrays), truth)
        except UNSUPPORTED as error:
            found[name] = {"error": str(error).splitlines()[0]}
            continue
        runs[name, "forward"] = lambda f=forward: f(*arrays)
        runs[name, "forward_backward"] = lambda f=forward_backward: f(*arrays)
        memory = temporary_bytes(forward_backward)
        found[name] = {"memory_mib": memory / 2**20, "errors": errors[name]}
    times = time_in_turns(runs, turns)
    for name in errors:
        pairs = zip(errors[name], errors["xla"], strict=True)
        found[name]["error_ratio"] = max(error / max(reference, 1e-6) for error, reference in pairs)
        for passes in ("forward", "forward_backward"):
            found[name][f"{passes}_ms"] = times[name, passes]
            found[name][f"{passes}_speedup"] = times["xla", passes] / times[name, passes]
    return found


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory that a program allocates beside its arguments and results, in bytes."""
    stats = program.memory_analysis()
    assert stats is not None
    return stats.temp_size_in_bytes


def compiled_memory(case: Case, chip: Any) -> dict[str, dict[str, Any]]:
    """Returns the memory that each implementation needs on a described TPU chip, or {"error": message}."""
    mesh = make_mesh(MeshConfig(data=1), [chip])
    sharding = NamedSharding(mesh, PartitionSpec())
    arrays = jax.eval_shape(lambda: inputs(case, jnp.bfloat16))
    arrays = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays)
    found: dict[str, dict[str, Any]] = {}
    with jax.set_mesh(mesh):
        for name, function in IMPLEMENTATIONS["tpu"].items():
            try:
                forward_backward = compile_passes(function, case, arrays)[1]
            except UNSUPPORTED as error:
                found[name] = {"error": str(error).splitlines()[0]}
                continue
            found[name] = {"memory_mib": temporary_bytes(forward_backward) / 2**20}
    return found


def described_chip(topology: str) -> Any:
    """Returns the description of one chip of a TPU topology; the TPU does not have to exist."""
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5p-8")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def show(name: str, case: Case, found: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of one case, one line for each implementation."""
    print(f"{name}: {dataclasses.astuple(case)[:-1]}{', packed' if case.packed else ''}")
    for implementation, x in found.items():
        if "error" in x:
            print(f"  {implementation:8} error: {x['error']}")
            continue
        if "forward_backward_ms" not in x:
            print(f"  {implementation:8} {x['memory_mib']:9.1f} MiB", flush=True)
            continue
        print(
            f"  {implementation:8} {x['forward_ms']:9.2f} ms {x['forward_speedup']:6.2f} x"
            f"   with backward {x['forward_backward_ms']:9.2f} ms {x['forward_backward_speedup']:6.2f} x"
            f"   {x['memory_mib']:9.1f} MiB   error ratio {x['error_ratio']:.2f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, measures, prints the results and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--size", choices=tuple(CASES), default="tiny")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--topology", help="a TPU topology: compile for it, run nothing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cases = CASES[options.size]
    if unknown := [name for name in options.cases if name not in cases]:
        known = ", ".join(map(repr, cases))
        parser.error(f"unknown cases: {', '.join(unknown)}; --size={options.size} has {known}")
    device = described_chip(options.topology) if options.topology else jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    print(f"JAX {jax.__version__}, {device.device_kind}, {jnp.dtype(dtype).name}")
    results = {}
    for name in options.cases or cases:
        case = cases[name]
        results[name] = (
            compiled_memory(case, device) if options.topology else measure(case, options.turns, dtype)
        )
        show(name, case, results[name])
    if options.json is not None:
        environment = {"jax": jax.__version__, "device": device.device_kind, "dtype": jnp.dtype(dtype).name}
        options.json.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    measured = [x for found in results.values() for x in found.values() if "error_ratio" in x]
    return int(any(x["error_ratio"] > 2 for x in measured))


if __name__ == "__main__":
    sys.exit(main())
