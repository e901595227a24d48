"""Measures as many rows as fit into a given time, the most important first, and writes each at once.

Each job is a process (see `worker`): several prepare at the same time, which is mostly compilation on the
host's cores, but only one measures, while the others are stopped. Of our side, only one prepares at a time,
because XLA times kernels while it compiles. A row that no longer fits, or fails, is reported with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.beside_torch.agreement import errors_between, exceeding
from benchmarks.beside_torch.jobs import Job

REFERENCES = ("ours", "xla")  # the columns that PyTorch's are compared with


class Stopped(Exception):
    """The process was asked to end."""


@dataclasses.dataclass
class Process:
    """A running job, and the cells that it has not measured yet."""

    job: Job
    popen: subprocess.Popen
    left: list[tuple[str, str]]
    pending: bytes = b""

    def signal(self, number: int) -> None:
        """Sends a signal to the process and to those that it has started."""
        try:
            os.killpg(self.popen.pid, number)
        except ProcessLookupError:
            pass

    def messages(self) -> list[dict[str, Any]] | None:
        """Returns what the process has said since the last call; None if it has ended."""
        assert self.popen.stdout is not None
        read = os.read(self.popen.stdout.fileno(), 1 << 16)
        if not read:
            return None
        *lines, self.pending = (self.pending + read).split(b"\n")
        return [json.loads(line) for line in lines]


class Results:
    """The table so far, in a file that is written anew after each row.

    `rows` has for each row its columns, each with the seconds or with the reason why there are none.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], about: dict[str, Any]):
        self.folder, self.environment = folder, about
        self.rows: dict[str, dict[str, Any]] = {}
        for row, column in (cell for job in jobs for cell in job.cells):
            self.rows.setdefault(row, {"columns": {}})["columns"][column] = {"not_measured": "not begun"}
        self.write()

    @property
    def found(self) -> dict[str, Any]:
        return {"environment": self.environment, "rows": self.rows}

    def put(self, row: str, column: str, cell: dict[str, Any], bound: dict[str, float]) -> None:
        """Adds a measured cell, and compares it with those that are there."""
        self.rows[row] |= bound
        self.rows[row]["columns"][column] = cell
        self.compare(row)
        self.write()

    def miss(self, row: str, column: str, reason: str, failed: bool = False) -> None:
        """Notes why a cell was not measured; `failed` if that should not have happened."""
        self.rows[row]["columns"][column] = {"not_measured": reason} | ({"failed": True} if failed else {})
        self.write()

    def compare(self, row: str) -> None:
        """Notes the errors between the reference and the other columns of a row."""
        columns = self.rows[row]["columns"]
        reference = next((c for n, c in columns.items() if n in REFERENCES and "result" in c), None)
        if reference is None:
            return
        truth = self._result(reference)
        for name, cell in columns.items():
            if name not in REFERENCES and "result" in cell:
                cell["errors"] = errors_between(truth, self._result(cell))
                cell["differs"] = exceeding(cell["errors"], self.environment["dtype"])

    def _result(self, cell: dict[str, Any]) -> dict[str, np.ndarray]:
        with np.load(self.folder / cell["result"]) as file:
            return dict(file)

    def write(self) -> None:
        """Writes the file; whoever reads it never sees half of it."""
        target = self.folder / "results.json"
        part = target.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        part.replace(target)


@dataclasses.dataclass
class Schedule:
    """Runs jobs until they are done or the time is over.

    Attributes:
      command: Returns the command of a job's process.
      seconds: The time for all of it.
      together: The processes that may prepare at the same time.
      gib: The device's memory, which they share.
      least: The seconds below which no further process is started: it could not measure anything.
    """

    jobs: list[Job]
    results: Results
    command: Callable[[Job], list[str]]
    seconds: float
    together: int
    gib: float
    least: float
    say: Callable[[str], None] = print
    running: list[Process] = dataclasses.field(default_factory=list)
    ready: list[tuple[Process, dict[str, Any]]] = dataclasses.field(default_factory=list)
    measuring: Process | None = None

    def run(self) -> None:
        """Runs the jobs. At the end no process is left, and each cell has its seconds or a reason."""
        self.waiting, self.start = list(self.jobs), time.monotonic()
        reason = f"no time left: the budget is {self.seconds:.0f} s"
        try:
            with selectors.DefaultSelector() as self.selector:
                while (self.waiting or self.running) and self.left > 0:
                    self._launch()
                    if not self.running:
                        break
                    for key, _ in self.selector.select(max(0.0, min(self.left, 1.0))):
                        self._listen(key.data)
                    self._measure_next()
        except Stopped:
            reason = "the benchmark was stopped"
        finally:
            self._end(reason)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def _launch(self) -> None:
        """Starts the jobs that fit, unless one is measuring."""
        for job in list(self.waiting):
            alone = not self.running
            room = self.gib - sum(process.job.gib for process in self.running)
            both_ours = job.side == "ours" and any(p.job.side == "ours" for p in self.running)
            if self.measuring is not None or self.left < self.least or len(self.running) >= self.together:
                return
            if not alone and (job.gib > room or both_ours):
                continue
            self.waiting.remove(job)
            log = (self.results.folder / f"{job.name}.{job.side}.log").open("wb")
            popen = subprocess.Popen(
                self.command(job),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a group of its own, to stop it with all that it starts
            )
            log.close()
            process = Process(job, popen, list(job.cells))
            self.running.append(process)
            assert popen.stdout is not None
            self.selector.register(popen.stdout, selectors.EVENT_READ, process)
            self.say(f"{self._clock()} {job.title}: begins")

    def _listen(self, process: Process) -> None:
        messages = process.messages()
        if messages is None:
            self._ended(process)
            return
        for message in messages:
            self._hear(process, message)

    def _hear(self, process: Process, message: dict[str, Any]) -> None:
        state = message["state"]
        if state == "hello":
            self.results.environment |= message["environment"]
            return
        if state == "ready":
            self.ready.append((process, message))
            return
        row, column = message["row"], message["column"]
        process.left.remove((row, column))
        if state == "failed":
            self.results.miss(row, column, message["reason"])
            self.say(f"{self._clock()} {row}, {column}: {message['reason']}")
            return
        self.results.put(row, column, message["cell"], message["bound"])
        self.say(f"{self._clock()} {row}, {column}: {message['cell']['seconds']:.4g} s")
        self._measured()

    def _measure_next(self) -> None:
        """Lets the first process that is ready measure, and stops the others until it has."""
        if self.measuring is not None or not self.ready:
            return
        self.measuring, _ = self.ready.pop(0)
        for other in self.running:
            if other is not self.measuring:
                other.signal(signal.SIGSTOP)
        assert self.measuring.popen.stdin is not None
        try:
            self.measuring.popen.stdin.write(b"go\n")
            self.measuring.popen.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its output will say so

    def _measured(self) -> None:
        self.measuring = None
        for process in self.running:
            process.signal(signal.SIGCONT)

    def _ended(self, process: Process) -> None:
        """Notes the cells that a process has left unmeasured, with the last line that it has written."""
        self._forget(process)
        code = process.popen.wait()
        log = self.results.folder / f"{process.job.name}.{process.job.side}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        for row, column in process.left:
            self.results.miss(row, column, f"its process ended with code {code}: {last[:200]}", failed=True)
            self.say(f"{self._clock()} {row}, {column}: the process ended with code {code}; see {log}")

    def _forget(self, process: Process) -> None:
        assert process.popen.stdout is not None and process.popen.stdin is not None
        self.selector.unregister(process.popen.stdout)
        self.running.remove(process)
        self.ready = [(other, message) for other, message in self.ready if other is not process]
        process.popen.stdout.close()
        try:
            process.popen.stdin.close()
        except BrokenPipeError:
            pass
        if self.measuring is process:
            self._measured()

    def _end(self, reason: str) -> None:
        """Kills what still runs, and notes what was not measured."""
        for process in self.running:
            process.signal(signal.SIGKILL)
            process.popen.wait()
            for row, column in process.left:
                self.results.miss(row, column, f"{reason}, and its process was still preparing it")
        for row, column in (cell for job in self.waiting for cell in job.cells):
            self.results.miss(row, column, reason)
        self.running, self.waiting = [], []

    def _clock(self) -> str:
        return f"[{self.seconds - self.left:5.0f} s]"
