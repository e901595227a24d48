"""The benchmark against PyTorch: the order of timing, the arithmetic, and the agreement of the two sides."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.beside_torch import bounds, report, timing
from benchmarks.beside_torch.__main__ import NAMES, main, parse, run
from benchmarks.beside_torch.sizes import make_size
from dreamllm_jax.models.parameters import abstract_params


def test_sides_alternate():
    calls = []
    works = {
        name: timing.Work(lambda n=name: calls.append(n), lambda n=name: calls.append(f"prepare {n}"))
        for name in ("ours", "theirs")
    }
    found = timing.alternate(works["ours"], works["theirs"], pairs=3, pause=0.0)
    runs = [name for name in calls if name in works]
    assert runs == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert calls[::2] == [f"prepare {name}" for name in calls[1::2]]
    assert len(found.ours) == len(found.theirs) == 3


def test_sides_that_do_not_fit_together_alternate_in_blocks():
    made = []

    def make(name):
        made.append(name)
        return timing.Work(lambda: None)

    found = timing.time_in_blocks(lambda: make("ours"), lambda: make("theirs"), pairs=3)
    assert made == ["ours", "theirs", "theirs", "ours"]
    assert len(found.ours) == len(found.theirs) == 4


def test_ratios_compare_neighbouring_repetitions():
    found = timing.Timing(ours=(1.0, 2.0, 4.0), theirs=(3.0, 2.0, 8.0)).summary()
    assert found == dict(ours_s=2.0, theirs_s=3.0, ratio=2.0, ratio_low=1.5, ratio_high=2.5, pairs=3)
    assert timing.Timing((1.0,), (2.0,)).summary()["ratio_low"] == 2.0


def test_bytes_read_per_token():
    """Counts all weights except the embedding table and the norms, and the cache at its mean length."""
    size = make_size("smallest", "float32")
    llama = {k: x for k, x in abstract_params(size.model).items() if k.startswith("llama/")}
    kernels = sum(math.prod(x.shape) for k, x in llama.items() if k.endswith("/kernel"))
    lengths = [size.prompt + decoded for decoded in range(1, size.new_tokens + 1)]
    cache = 2 * 2 * 2 * 8 * np.mean(lengths)  # keys and values, layers, heads, width
    assert bounds.token_bytes(size, 1) == 4 * (kernels + cache)
    assert bounds.token_bytes(size, 3) == 4 * (kernels + 3 * cache)
    assert 2 * bounds.token_bytes(make_size("smallest", "bfloat16"), 1) == bounds.token_bytes(size, 1)


def test_the_command_line():
    assert parse([]).cases == parse(["all"]).cases == list(NAMES)
    assert parse(["decode", "--size=full"]).cases == ["decode"]
    for wrong in (["decoding"], ["decode", "--document=x"], ["--pairs=0"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_each_case_has_its_own_process_on_a_cpu(monkeypatch, tmp_path, capsys):
    commands = []

    def measure(command, **_):
        commands.append(command)
        name = command[3]
        result = {
            "environment": {"command": name, "load": len(commands)},
            "results": {f"{name}, 1": {"ratio": 2}},
        }
        Path(command[4].removeprefix("--json=")).write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, int(name == "documents"))

    monkeypatch.setattr(subprocess, "run", measure)
    monkeypatch.setattr(
        "sys.argv", ["x", "decode", "prefill", "--pairs=3", f"--json={tmp_path / 'all.json'}"]
    )
    assert main() == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found["results"]) == ["decode, 1", "prefill, 1"]
    environment = found["environment"]
    assert environment["load"] == 1
    assert environment["command"].endswith("beside_torch decode prefill --pairs=3")
    assert all({"--pairs=3", "--size=tiny", "--device=cpu"} <= set(command) for command in commands)
    monkeypatch.setattr("sys.argv", ["x", "decode", "documents", "--rows=2"])
    assert main() == 1 and "The case documents failed" in capsys.readouterr().err
    assert "--rows=2" in commands[-1]


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("torch")
    return run(parse(["--size=smallest", "--pairs=2"]))


@pytest.mark.parity
def test_all_cases_agree_and_are_timed(found):
    assert json.loads(json.dumps(found)) == found
    kinds = ["joint, stage2", "prefill, 1", "prefill, 2", "decode, 1", "decode, 2"]
    kinds += ["text to image", "document"]
    assert len(found["results"]) == len(kinds)
    for kind, (name, result) in zip(kinds, found["results"].items(), strict=True):
        assert name.startswith(kind)
        assert result["pairs"] == 2 and result["ours_s"] > 0 and result["theirs_s"] > 0
        assert result["errors"] and all(e >= 0 for e in result["errors"].values()), name
    environment = found["environment"]
    assert environment["threads"]["torch"] == environment["threads"]["cores"]
    assert environment["versions"]["jax"]


@pytest.mark.parity
def test_sides_that_differ_are_not_timed():
    pytest.importorskip("torch")
    from benchmarks.beside_torch import cases
    from benchmarks.beside_torch.inputs import Inputs

    session = cases.Session(Inputs(make_size("smallest", "float32")), None, 1)
    assert session.check_agreement("x", {"loss": 9e-5}) == {"loss": 9e-5}
    for wrong in ({"loss": 2e-4}, {"loss": float("nan")}, {"tokens": 0.1}):
        with pytest.raises(timing.Disagreement, match="the two sides differ"):
            session.check_agreement("x", wrong)


@pytest.mark.parity
def test_the_table(found):
    lines = report.rows(found)
    assert all(any(line.startswith(f"| {name} | ") for line in lines) for name in found["results"])
    assert found["environment"]["device"] in lines[-1]
