"""The attention benchmark: the figures that it measures on this device, and its exit code."""

import json

import jax
import pytest

from benchmarks import kernels
from benchmarks.kernels import Case, main


@pytest.fixture
def small(monkeypatch):
    """Leaves one small case, and returns the table of implementations, to which a test can add its own."""
    monkeypatch.setitem(kernels.CASES, "tiny", {"some": Case(2, 320, 320, 4, 2, 16, packed=True)})
    table = dict(kernels.IMPLEMENTATIONS[jax.default_backend()])
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, jax.default_backend(), table)
    return table


def test_figures(small, tmp_path, capsys):
    def unsupported(*_):
        raise NotImplementedError("not on this device\nand more")

    small["other"] = unsupported
    assert main(["--turns=2", f"--json={tmp_path / 'x.json'}"]) == 0
    found = json.loads((tmp_path / "x.json").read_text())["results"]["some"]
    assert found["other"] == {"error": "not on this device"}
    assert found["xla"]["forward_backward_speedup"] == 1 and found["chunked"]["forward_backward_ms"] > 0
    assert found["chunked"]["memory_mib"] < found["xla"]["memory_mib"]
    assert "other    error: not on this device" in capsys.readouterr().out


def test_the_exit_code_is_1_for_a_wrong_implementation(small):
    small["wrong"] = lambda q, k, v, mask: small["xla"](q, k, v, None)
    assert main(["--turns=1"]) == 1
