"""Tables in documents: between their marks, and nowhere else."""

import json
import sys

import pytest

from benchmarks import demonstration
from benchmarks.document_table import write_table

TARGETS = {name: {"least": 0.9} for name in demonstration.SCORES} | {"seconds_total": {"most": 720}}


def run_of(seed: int, jax: str, seconds: float) -> dict:
    """Returns what the evaluation of a run leaves in metrics.json, as far as the table reads it."""
    scores = {name: 0.98 for name in demonstration.SCORES} | {"seconds_total": seconds}
    reached = {"document_accuracy": True, "seconds_total": seconds <= 720}
    return scores | dict(seed=seed, machine={"jax": jax}, targets=TARGETS, reached=reached)


def test_a_table_replaces_what_was_between_its_marks(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- a b -->\nold\n<!-- /a b -->\nafter\n<!-- c -->\n<!-- /c -->\n")
    write_table(document, "a b", ["| 1 |", "| \\2 |"])
    expected = "before\n<!-- a b -->\n| 1 |\n| \\2 |\n<!-- /a b -->\nafter\n<!-- c -->\n<!-- /c -->\n"
    assert document.read_text() == expected
    with pytest.raises(ValueError, match="has no <!-- fidelity --> and <!-- /fidelity -->"):
        write_table(document, "fidelity", [])


def test_the_runs_of_the_demonstration_in_one_table(tmp_path, monkeypatch, capsys):
    for seed, jax, seconds in ((1, "0.12.0", 650.4), (2, "0.10.2", 700.0), (0, "0.12.0", 640.0)):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "metrics.json").write_text(json.dumps(run_of(seed, jax, seconds)))
    document = tmp_path / "page.md"
    document.write_text("<!-- demonstration -->\n<!-- /demonstration -->\n")
    folders = [str(tmp_path / seed) for seed in "012"]
    monkeypatch.setattr(sys, "argv", ["demonstration", *folders, f"--document={document}"])
    assert demonstration.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:5]] == [
        ["| 0.10.2", "2"],
        ["| 0.12.0", "0"],
        ["| 0.12.0", "1"],
    ]
    assert lines[4].endswith("| 650 |") and lines[5].endswith("| 0.9 | 720 |")
    assert document.read_text().splitlines()[1:-1] == lines[:6]


def test_a_run_that_misses_a_target_or_has_no_metrics(tmp_path, monkeypatch, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(run_of(0, "0.12.0", 721.0)))
    monkeypatch.setattr(sys, "argv", ["demonstration", str(tmp_path)])
    assert demonstration.main() == 1
    assert f"{tmp_path}: seconds_total misses its target" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["demonstration", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        demonstration.main()
    assert "has no metrics.json; run launch/quickstart.sh" in capsys.readouterr().err
