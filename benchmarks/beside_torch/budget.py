"""The mode `--budget`: measures each side in its own process, within a given time, and writes a report."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from benchmarks.beside_torch import summary
from benchmarks.beside_torch.jobs import SIDES, Job, plan
from benchmarks.beside_torch.report import command_line
from benchmarks.beside_torch.schedule import Results, Schedule, Stopped
from benchmarks.beside_torch.sizes import make_size

REPORTING_S = 8.0  # the table and the chart, from the budget
# By size: the seconds below which a process is not started, and those of repetitions in each row.
LEAST_S = {"full": 40.0, "tiny": 10.0, "smallest": 5.0}
ROW_S = {"full": 5.0, "tiny": 3.0, "smallest": 0.2}
# On a smaller device, stage II has one row on both sides. Compiled for an H100, our step then needs about
# 71 GiB, but 97 GiB where the gradients of four rows are added up over micro-batches.
WHOLE_STAGE2_GIB = 120.0
JOBS = {
    "joint": ("stage1", "stage2"),
    "prefill": ("text",),
    "decode": ("text",),
    "text_to_image": ("text_to_image",),
    "kernels": ("kernels",),
}


def gpu_memory() -> float:
    """Returns the memory of the first GPU in GiB, as nvidia-smi says.

    Raises:
      ValueError: nvidia-smi is missing, or finds no GPU.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        raise ValueError("nvidia-smi was not found, so there is no GPU to measure on; pass --device=cpu.")
    found = subprocess.run(command, capture_output=True, text=True)
    try:
        return float(found.stdout.split()[0]) / 1024
    except (IndexError, ValueError) as error:
        raise ValueError(
            f"nvidia-smi knows no GPU ({(found.stdout + found.stderr).strip()!r}); pass --device=cpu."
        ) from error


def worker_command(job: Job, options: argparse.Namespace, dtype: str, stage2_rows: int) -> list[str]:
    """Returns the command of a job's process."""
    command = [sys.executable, "-m", "benchmarks.beside_torch.worker", job.name, f"--side={job.side}"]
    command += [f"--size={options.size}", f"--device={options.device}", f"--dtype={dtype}"]
    if job.name == "stage2":
        command.append(f"--rows={stage2_rows}")
    return [*command, f"--seconds={ROW_S[options.size]}", f"--folder={options.out}"]


def measure(options: argparse.Namespace) -> int:
    """Measures within `options.budget` seconds, reports into `options.out` and returns the exit code.

    Raises:
      ValueError: there is no GPU where one is needed.
    """
    start = time.monotonic()
    gpu = options.device == "gpu"
    dtype = ("bfloat16" if gpu else "float32") if options.dtype == "auto" else options.dtype
    gib = gpu_memory() if gpu else float("inf")
    size = make_size(options.size, dtype)
    names = tuple(dict.fromkeys(job for case in options.cases for job in JOBS[case]))
    stage2_rows = size.rows if gib >= WHOLE_STAGE2_GIB or options.size != "full" else 1
    jobs = plan(names, SIDES[:2] if options.eager_only else SIDES, size, options.device, stage2_rows)
    options.out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"command": command_line(), "dtype": dtype, "budget_s": options.budget}
    schedule = Schedule(
        jobs,
        Results(options.out, jobs, about | ({"memory_gib": gib} if gpu else {})),
        lambda job: worker_command(job, options, dtype, stage2_rows),
        options.budget - REPORTING_S - (time.monotonic() - start),
        options.together or (min(3, len(os.sched_getaffinity(0)) // 4) or 1),
        gib - 1 if gpu else gib,
        LEAST_S[options.size],
        lambda line: print(line, file=sys.stderr, flush=True),
    )

    def stop(*_: Any) -> None:
        for number in before:  # once is enough: what follows is short, and writes the report
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        schedule.run()
        return 0 if summary.write(options.out) else 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
