"""Loggers: series as JSON lines that survive a crash, and for TensorBoard."""

import json
from types import SimpleNamespace

import pytest

from dreamllm_jax.train.hooks import loggers
from dreamllm_jax.train.hooks.loggers import JsonLinesLogger, TensorBoardLogger, read_curves
from dreamllm_jax.train.hooks.protocol import HookList, Record
from dreamllm_jax.train.state import TrainState
from tests.train import tiny

STATE = TrainState(step=0, key=None, trainable={}, frozen={}, opt_state=None, ema={})


@pytest.fixture
def log_all(tmp_path):
    """Logs records as a stage in `tmp_path` does; returns its folder of logs."""
    context = tiny.stage_context(tmp_path)

    def log(*records: Record):
        hooks = HookList([JsonLinesLogger(), TensorBoardLogger()])
        hooks.before_stage(context, STATE)
        for record in records:
            hooks.log(record)
        hooks.close()
        return context.folder.logs

    return log


def test_curves_are_read_as_they_were_written(log_all, tmp_path):
    curves = [{"step": 10, "loss": 0.5, "tokens": 3.0}, {"step": 20, "loss": 0.25, "tokens": 4.0}]
    records = [Record("curves", c["step"], {k: v for k, v in c.items() if k != "step"}) for c in curves]
    speed = [Record("speed", step, {"mfu": mfu}) for step, mfu in ((10, 0.5), (20, 0.6))]
    logs = log_all(*records, *speed)
    assert list(read_curves(logs)) == curves
    assert list(read_curves(logs, "speed")) == [{"step": 10, "mfu": 0.5}, {"step": 20, "mfu": 0.6}]
    lines = (logs / "speed.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 10, "mfu": 0.5}, {"step": 20, "mfu": 0.6}]
    assert list(read_curves(tmp_path / "nowhere")) == []
    assert any((logs / "tensorboard").iterdir())


def test_the_last_record_of_a_step_counts(log_all, tmp_path):
    """A crash cut off a line; the run that resumes repeats a step and continues."""
    lines = [json.dumps({"step": s, "loss": float(s)}) for s in (10, 20, 30)]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "curves.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    logs = log_all(*(Record("curves", step, {"loss": loss}) for step, loss in ((30, 3.5), (40, 4.5))))
    assert [(r["step"], r["loss"]) for r in read_curves(logs)] == [
        (10, 10),
        (20, 20),
        (30, 3.5),
        (40, 4.5),
    ]


def test_tensorboard_has_the_series_as_prefix(tmp_path, monkeypatch):
    scalars = []
    monkeypatch.setattr(
        loggers,
        "SummaryWriter",
        lambda folder: SimpleNamespace(add_scalar=lambda *args: scalars.append(args)),
    )
    logger = TensorBoardLogger()
    logger.before_stage(tiny.stage_context(tmp_path), STATE, print)
    logger.log(Record("curves", 10, {"loss": 0.5}))
    logger.log(Record("validation", 10, {"loss": 0.75}))
    assert scalars == [("loss", 0.5, 10), ("validation/loss", 0.75, 10)]
