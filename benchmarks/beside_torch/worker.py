"""Measures one job on one side, in a process of its own, as `budget` asks for it.

    python -m benchmarks.beside_torch.worker JOB --side=ours|eager|compiled --size=... --device=...
        --dtype=... --folder=DIR

It writes one JSON object a line to stdout, and reads stdin: before each row it says that it is ready, having
compiled and warmed up, and waits for a line, so that no other process works while it measures. The arrays on
which both sides must agree go into DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

MOST, LEAST = 20, 3  # repetitions


class Channel:
    """Talks to the process that started this one; whatever else is printed goes to stderr."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        """Sends one message."""
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def wait(self) -> None:
        """Waits for permission to measure."""
        if not sys.stdin.readline():
            sys.exit(1)  # nobody listens any more


def repeat(work: Any, limit: float) -> list[float]:
    """Returns the seconds of repetitions: at least 3, at most 20, and none once `limit` seconds are over."""
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < MOST and sum(seconds) < limit):
        seconds.append(work.seconds())
    return seconds


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--side", required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--rows", type=int, help="of a train step (default: those of --size)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of repetitions in each row")
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> int:
    """Measures the job's rows one after the other, and returns the exit code."""
    options = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if options.device == "cpu" else "cuda")
    if options.side != "ours":  # JAX only draws the weights: what it frees is PyTorch's
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    channel = Channel()
    import jax
    import numpy as np

    from benchmarks.beside_torch import rows

    if jax.default_backend() != options.device:
        raise ValueError(f"JAX runs on {jax.default_backend()}, but --device is {options.device}.")
    side = rows.Side(options.side, options.size, options.device, options.dtype, options.rows)
    channel.say(state="hello", environment=rows.environment(side))
    for number, row in enumerate(rows.JOBS[options.job](side)):
        if row.error is not None:
            channel.say(state="failed", row=row.name, column=row.column, reason=row.error)
            continue
        channel.say(state="ready", row=row.name, column=row.column)
        channel.wait()
        seconds = repeat(row.work, options.seconds)
        file = options.folder / f"{options.job}.{options.side}.{number}.npz"
        np.savez(file, **row.result)
        cell = {"seconds": statistics.median(seconds), "repetitions": seconds, "result": file.name}
        cell |= row.figures() | rows.peak_memory(side)
        channel.say(state="measured", row=row.name, column=row.column, cell=cell, bound=row.bound())
    return 0


if __name__ == "__main__":
    sys.exit(main())
