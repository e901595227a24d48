"""Loggers: records as JSON lines and for TensorBoard, and the reader of the JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tensorboardX import SummaryWriter

from dreamllm_jax.distributed import is_main
from dreamllm_jax.train.hooks.protocol import Hook, Log, Record
from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState


class JsonLinesLogger(Hook):
    """Appends records to `<series>.jsonl` in the stage's logs: one line `{"step": 10, "loss": 0.5}` each.

    Process 0 writes.
    """

    def __init__(self) -> None:
        self._files: dict[str, TextIO] = {}

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        self._folder = context.folder.logs

    def log(self, record: Record) -> None:
        if not is_main():
            return
        if record.series not in self._files:
            self._files[record.series] = _open_for_appending(self._folder / f"{record.series}.jsonl")
        file = self._files[record.series]
        file.write(json.dumps({"step": record.step, **record.values}) + "\n")
        file.flush()

    def after_stage(self) -> None:
        for file in self._files.values():
            file.close()


def _open_for_appending(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    if file.tell():  # a crash may have cut off the end of the last line
        file.write("\n")
    return file


class TensorBoardLogger(Hook):
    """Writes records as scalars into `tensorboard/` in the stage's logs; process 0 writes.

    The curves keep their names, other series are a prefix: `loss_lm`, `speed/tokens_per_second`.
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        if is_main():
            self._writer = SummaryWriter(str(context.folder.logs / "tensorboard"))

    def log(self, record: Record) -> None:
        if self._writer is not None:
            prefix = "" if record.series == "curves" else f"{record.series}/"
            for name, value in record.values.items():
                self._writer.add_scalar(prefix + name, value, record.step)

    def after_stage(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_curves(folder: Path, series: str = "curves") -> Iterator[dict[str, float]]:
    """Yields the records of `<series>.jsonl` in a folder of logs, by step.

    A resumed run repeats some steps; the last record of each counts. Lines that a crash cut off are skipped.
    """
    records: dict[int, dict[str, float]] = {}
    path = folder / f"{series}.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            records[record["step"]] = record
    yield from (records[step] for step in sorted(records))
