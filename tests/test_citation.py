"""CITATION.cff: valid, and of this software."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_it_is_valid():
    """Against the schema of the Citation File Format, which comes with check-jsonschema."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.citation-file-format"]
    done = subprocess.run([*check, "CITATION.cff"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_agrees_with_the_package():
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert content["title"] == project["name"].replace("-", "_") and content["license"] == project["license"]
    assert content["authors"] == [{"name": "The dreamllm_jax authors"}]
    (paper,) = content["references"]
    assert paper["identifiers"] == [{"type": "doi", "value": "10.48550/arXiv.2309.11499"}]
