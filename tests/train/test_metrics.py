"""Curves that survive a crash, and what a run took."""

import json

import numpy as np
import pytest

from dreamllm_jax.train.metrics import Meter, MetricWriter, read_curves


def test_curves_are_read_as_they_were_written(tmp_path):
    writer = MetricWriter(tmp_path)
    assert writer.write(10, {"loss": np.float32(0.5), "tokens": 3}) == {"loss": 0.5, "tokens": 3.0}
    writer.write(20, {"loss": 0.25, "tokens": 4})
    writer.close()
    assert list(read_curves(tmp_path)) == [
        {"step": 10, "loss": 0.5, "tokens": 3.0},
        {"step": 20, "loss": 0.25, "tokens": 4.0},
    ]
    assert any((tmp_path / "tensorboard").iterdir())
    assert list(read_curves(tmp_path / "nowhere")) == []


def test_a_resumed_run_counts_last(tmp_path):
    """A crash cut a line short; the run that resumes repeats a step and goes on."""
    lines = [json.dumps({"step": s, "loss": float(s)}) for s in (10, 20, 30)]
    (tmp_path / "curves.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    writer = MetricWriter(tmp_path)
    for step, loss in ((30, 3.5), (40, 4.5)):
        writer.write(step, {"loss": loss})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_curves(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, 3.5),
        (40, 4.5),
    ]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    hands = [1000.0]
    monkeypatch.setattr("dreamllm_jax.train.metrics.time.monotonic", lambda: hands[0])
    return hands


def test_a_meter_counts_seconds(clock):
    meter = Meter()
    clock[0] += 2.5
    assert meter.read()["seconds"] == 2.5
    clock[0] += 1
    assert meter.read()["seconds"] == 3.5 and Meter().read()["seconds"] == 0


def test_a_meter_has_its_own_peak():
    earlier = Meter()
    block = np.ones(40 * 2**20, np.uint8)  # touched, hence resident
    high = earlier.read()["peak_rss_gib"]
    del block
    meter = Meter()
    first = meter.read()
    assert 0 < first["peak_rss_gib"] <= high
    block = np.ones(120 * 2**20, np.uint8)
    assert meter.read()["peak_rss_gib"] > first["peak_rss_gib"] + 0.05
    del block


def test_a_meter_goes_on_from_an_earlier_run(clock):
    meter = Meter()
    meter.resume({"seconds": 100.0, "peak_rss_gib": 512.0})
    clock[0] += 7
    assert meter.read() == {"seconds": 107.0, "peak_rss_gib": 512.0}
