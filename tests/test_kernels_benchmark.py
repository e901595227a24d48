"""The benchmark of attention: what it measures on this device, and what it holds for wrong."""

import json

import jax
import pytest

from benchmarks import kernels
from benchmarks.kernels import Case, main


@pytest.fixture
def small(monkeypatch):
    """One small case, and a third implementation."""
    monkeypatch.setitem(kernels.CASES, "tiny", {"some": Case(2, 320, 320, 4, 2, 16, packed=True)})
    table = dict(kernels.IMPLEMENTATIONS[jax.default_backend()])
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, jax.default_backend(), table)
    return table


def test_figures(small, tmp_path, capsys):
    def none(*_):
        raise NotImplementedError("not on this device\nand more")

    small["none"] = none
    assert main(["--turns=2", f"--json={tmp_path / 'x.json'}"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["results"]["some"]
    assert found["none"] == {"impossible": "not on this device"}
    assert found["xla"]["faster_both"] == 1 and found["chunked"]["both_ms"] > 0
    assert found["chunked"]["memory_mib"] < found["xla"]["memory_mib"]
    assert "none     impossible: not on this device" in capsys.readouterr().out


def test_an_implementation_that_is_wrong(small):
    small["wrong"] = lambda q, k, v, mask: small["xla"](q, k, v, None)
    assert main(["--turns=1"]) == 1
