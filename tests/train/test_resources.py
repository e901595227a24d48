"""The resources of a run: seconds and peak memory."""

import numpy as np
import pytest

from dreamllm_jax.train.resources import ResourceMeter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    hands = [1000.0]
    monkeypatch.setattr("dreamllm_jax.train.resources.time.monotonic", lambda: hands[0])
    return hands


def test_a_meter_counts_seconds(clock):
    meter = ResourceMeter()
    clock[0] += 2.5
    assert meter.read()["seconds"] == 2.5
    clock[0] += 1
    assert meter.read()["seconds"] == 3.5 and ResourceMeter().read()["seconds"] == 0


def test_a_meter_has_its_own_peak():
    earlier = ResourceMeter()
    block = np.ones(40 * 2**20, np.uint8)  # touched, hence resident
    high = earlier.read()["peak_rss_gib"]
    del block
    meter = ResourceMeter()
    first = meter.read()
    assert 0 < first["peak_rss_gib"] <= high
    block = np.ones(120 * 2**20, np.uint8)
    assert meter.read()["peak_rss_gib"] > first["peak_rss_gib"] + 0.05
    del block


def test_a_meter_goes_on_from_an_earlier_run(clock):
    meter = ResourceMeter()
    meter.resume({"seconds": 100.0, "peak_rss_gib": 512.0})
    clock[0] += 7
    assert meter.read() == {"seconds": 107.0, "peak_rss_gib": 512.0}
