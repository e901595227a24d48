"""The resources of a run: wall-clock time and peak memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path


class ResourceMeter:
    """Measures wall-clock seconds and peak resident memory from its creation to each `read`."""

    def __init__(self):
        self._start, self._earlier = time.monotonic(), {"seconds": 0.0, "peak_rss_gib": 0.0}
        try:  # on Linux, reset the high-water mark of memory, so that each stage has its own
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def resume(self, earlier: dict[str, float]) -> None:
        """Adds what an earlier run had read."""
        self._earlier = earlier

    def read(self) -> dict[str, float]:
        """Returns `seconds` and `peak_rss_gib`, those of the earlier run included."""
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
