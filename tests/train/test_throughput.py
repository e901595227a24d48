"""Throughput: counts divided by seconds."""

import types

import pytest

from dreamllm_jax.train import throughput
from dreamllm_jax.train.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now.seconds)
    return now


def test_rates(clock, batch):
    meter = Throughput({"llama": 3e12, "unet": 1e12}, devices=4, kind="TPU v5", slots=batch.segment_ids.size)
    meter.count(batch)
    clock.seconds += 1000  # compiling
    meter.restart()
    assert meter.read() == {}
    for _ in range(2):
        meter.count(batch)
    clock.seconds += 4
    rates = meter.read()
    real = int((batch.segment_ids > 0).sum())
    assert rates["steps_per_second"] == 0.5 and rates["tokens_per_second"] == real / 2
    assert rates["images_per_second"] == batch.image_mask.sum() / 2
    assert rates["dreams_per_second"] == batch.dream_mask.sum() / 2
    assert rates["pad_share"] == pytest.approx(1 - real / batch.segment_ids.size)
    filled = batch.image_mask.sum() + batch.dream_mask.sum()
    every = batch.image_mask.size + batch.dream_mask.size
    assert rates["picture_pad_share"] == pytest.approx(1 - filled / every) and 0 < filled < every
    assert rates["tflops_per_device/llama"] == pytest.approx(3 * 0.5 / 4)
    assert rates["mfu/llama"] == pytest.approx(3e12 * 0.5 / 4 / 459e12)
    assert rates["mfu"] == pytest.approx(4e12 * 0.5 / 4 / 459e12)
    assert meter.read() == {}


def test_an_unknown_device_has_no_peak(clock, batch):
    meter = Throughput({"llama": 1e12}, devices=1, kind="cpu", slots=batch.segment_ids.size)
    meter.count(batch)
    clock.seconds += 1
    rates = meter.read()
    assert rates["tflops_per_device/llama"] == 1 and not [name for name in rates if name.startswith("mfu")]


def test_pauses_do_not_count(clock, batch):
    meter = Throughput({}, devices=1, kind="cpu", slots=batch.segment_ids.size)
    meter.count(batch)
    clock.seconds += 2
    with meter.paused():
        clock.seconds += 100
    assert meter.read()["steps_per_second"] == 0.5
