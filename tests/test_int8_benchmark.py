"""The benchmark of int8 weights: rows of a golden folder and of a demonstration's scores."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.int8 import SCORES, main

GOLDEN = Path(__file__).parent / "golden" / "dreamllm-a"


def test_the_table(tmp_path, capsys):
    for name, score in (("metrics.json", 1.0), ("metrics-int8.json", 0.5)):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(SCORES, score)))
    document = tmp_path / "page.md"
    document.write_text("<!-- int8 -->\nold\n<!-- /int8 -->\n")
    main([str(GOLDEN), f"--handwriting={tmp_path}", f"--document={document}"])
    table = capsys.readouterr().out
    assert document.read_text() == f"<!-- int8 -->\n{table}<!-- /int8 -->\n"
    saved, int8 = (float(x) for x in re.findall(r"([\d.]+e-\d+), \d+ of", table))
    assert saved < 1e-5 < int8 < 0.05
    assert "| demonstration: creation | 1.000 | 0.500 |" in table


def test_a_demonstration_must_be_evaluated_both_ways(tmp_path):
    with pytest.raises(ValueError, match="has no metrics.json and no metrics-int8.json; run python -m exam"):
        main([f"--handwriting={tmp_path}"])
