"""What stands beside the figures, and their table in a document."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LD_PRELOAD")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "diffusers")


def measurement_environment(options: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    """Returns the command, device, threads, load and package versions of a measurement."""
    import jax
    import torch

    return {
        "command": command_line(),
        "size": options.size,
        "device": device_name(),
        "threads": {
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.get_num_threads(),
            "NPROC": os.environ["NPROC"] if "NPROC" in os.environ else None,
        },
        "load": os.getloadavg()[0],
        "environment_variables": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "torch_compile": compiled,
        "devices": len(jax.devices()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def command_line() -> str:
    """Returns the command with the options and environment variables that affect the figures."""
    typed = [word for word in sys.argv[1:] if not word.startswith(("--json", "--document"))]
    command = shlex.join(["python", "-m", "benchmarks.beside_torch", *typed])
    return " ".join([*(f"{n}={shlex.quote(os.environ[n])}" for n in ENVIRONMENT if n in os.environ), command])


def device_name() -> str:
    """Returns the name of the accelerator, or the name and the core count of the processor."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{cores} cores of {name}"


def rows(found: dict[str, Any]) -> list[str]:
    """Returns the lines of the Markdown table and of the sentence below it."""
    lines = ["| | ours, s | PyTorch, s | ratio | quartiles |", "|---|---|---|---|---|"]
    for name, r in found["results"].items():
        spread = f"{r['ratio_low']:.2f} to {r['ratio_high']:.2f}"
        lines.append(f"| {name} | {r['ours_s']:.3f} | {r['theirs_s']:.3f} | {r['ratio']:.2f} | {spread} |")
    environment = found["environment"]
    versions = environment["versions"]
    lines += [
        "",
        f"`{environment['command']}`: {environment['device']}, "
        f"JAX {versions['jax']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, diffusers {versions['diffusers']}; "
        f"load {environment['load']:.1f} at the start.",
    ]
    return lines
