"""What a run reports of itself: curves (JSON lines and TensorBoard), seconds, peak memory."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from dreamllm_jax.distributed import is_main


class MetricWriter:
    """Appends records to `curves.jsonl`, `speed.jsonl`, TensorBoard under `folder`; process 0 alone does."""

    def __init__(self, folder: Path):
        self._writes = is_main()
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "curves.jsonl").open("a", encoding="utf-8")
        if self._file.tell():  # after a crash: the last line may lack its end
            self._file.write("\n")
        self._speed = folder / "speed.jsonl"
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Writes one step's scalars, and returns them as floats (on all processes)."""
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        if not self._writes:
            return values
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        return values

    def write_speed(self, step: int, rates: dict[str, float]) -> None:
        """Appends one step's rates to `speed.jsonl`, and to TensorBoard under `speed/`."""
        if not self._writes:
            return
        with self._speed.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rates}) + "\n")
        for name, value in rates.items():
            self._board.add_scalar(f"speed/{name}", value, step)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._board.close()


def read_curves(folder: Path) -> Iterator[dict[str, float]]:
    """The records of `curves.jsonl`, the last one of each step (a resumed run repeats some)."""
    records: dict[int, dict[str, float]] = {}
    path = folder / "curves.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line that a crash cut short, or the empty one after it
                continue
            records[record["step"]] = record
    yield from (records[s] for s in sorted(records))


class Meter:
    """Wall-clock seconds and peak resident memory between its making and `read`."""

    def __init__(self):
        self._start, self._earlier = time.monotonic(), {"seconds": 0.0, "peak_rss_gib": 0.0}
        try:  # Linux: begin a new high-water mark, so that each stage has its own
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def resume(self, earlier: dict[str, float]) -> None:
        """Counts what an earlier run had read."""
        self._earlier = earlier

    def read(self) -> dict[str, float]:
        """`seconds` and `peak_rss_gib`, of the earlier run too."""
        return {
            "seconds": self._earlier["seconds"] + time.monotonic() - self._start,
            "peak_rss_gib": max(self._earlier["peak_rss_gib"], _peak_kib() / 2**20),
        }


def _peak_kib() -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return float(found[1])
    unit = 1024 if sys.platform == "darwin" else 1  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
