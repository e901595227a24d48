"""benchmarks/gpu.sh: its arguments, what it installs, and a whole run on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="the script needs bash")


def run_script(
    *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BASH, str(SCRIPT), f"--python={python}", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def stub(folder: Path, missing: str = "", lacking: str = "-") -> Path:
    """Returns a Python that lacks `missing`, and prints the commands that matter here."""
    path = folder / "python"
    path.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case "$*" in
          *version_info*) ;;
          *"find_spec('{lacking}')"*) exit 1 ;;
          *find_spec*) ;;
          -) cat >/dev/null; printf '{missing}' ;;
          "-m pip"*) echo "$@" >>"{folder}/calls" ;;
          *) echo "$@" >>"{folder}/calls"; echo "$PYTHONPATH" >>"{folder}/calls" ;;
        esac
        """)
    )
    path.chmod(0o755)
    return path


def test_the_script_parses_and_is_clean():
    subprocess.run([BASH, "-n", str(SCRIPT)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert os.access(SCRIPT, os.X_OK)
    assert run_script("--help").stdout.startswith("Measures this package beside PyTorch")


def test_the_script_refuses_in_one_sentence(tmp_path):
    python = str(stub(tmp_path, lacking="torch"))
    out = f"--out={tmp_path / 'o'}"
    for arguments, sentence in (
        ([], "--out is missing; give the folder for the results, as --out=DIR."),
        ([out, "--seconds=ten"], "--seconds=ten is not a whole number; give one from 60 on."),
        ([out, "--seconds=59"], "--seconds=59 is too short; give at least 60."),
        ([out, "--wheels=/nowhere"], "--wheels=/nowhere is not a folder; give one that exists."),
        ([out, "--budget=5"], "--budget=5 is set by this script; give --seconds=N for all of it"),
        ([out], "has no torch; install one that knows this machine's GPU."),
    ):
        result = run_script(*arguments, python=python)
        assert result.returncode == 1 and sentence in result.stderr, result
        assert len(result.stderr.splitlines()) == 1
    result = run_script(out, python="/nowhere/python")
    assert "--python=/nowhere/python was not found; give the path of a Python 3.11 or newer." in result.stderr


def test_the_script_installs_what_is_missing_and_measures_for_the_rest_of_the_time(tmp_path):
    python = str(stub(tmp_path, missing=r"diffusers\ngrain\n"))
    (tmp_path / "wheels").mkdir()
    result = run_script(
        f"--out={tmp_path / 'o'}", f"--wheels={tmp_path / 'wheels'}", "--seconds=100", "decode", python=python
    )
    assert result.returncode == 0, result
    pip, benchmark, path = (tmp_path / "calls").read_text().splitlines()
    assert pip.startswith("-m pip install") and pip.endswith("diffusers grain")
    assert f"--no-index --find-links {tmp_path / 'wheels'} --no-deps" in pip
    assert path.split(":")[0] == str(ROOT) and path.split(":")[1] in pip
    words = benchmark.split()
    assert words[:2] == ["-m", "benchmarks.beside_torch"] and words[-1] == "decode"
    assert {f"--out={tmp_path / 'o'}", "--device=gpu", "--size=full"} <= set(words)
    assert 85 <= int(words[2].removeprefix("--budget=")) <= 95
    (tmp_path / "calls").unlink()
    python = str(stub(tmp_path, missing="grain"))
    assert run_script(f"--out={tmp_path / 'o'}", python=python).returncode == 0
    assert "--no-index" not in (tmp_path / "calls").read_text().splitlines()[0]


@pytest.mark.parity
def test_the_script_runs_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    result = run_script(
        f"--out={tmp_path}", "--seconds=400", "--device=cpu", "--size=smallest", "--eager-only", "kernels"
    )
    assert result.returncode == 0, result
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"].values()
    assert row["columns"].keys() == {"xla", "chunked", "eager"}
    assert all(cell["seconds"] > 0 for cell in row["columns"].values())
    assert not row["columns"]["eager"]["differs"] and row["columns"]["eager"]["errors"]["attention"] < 1e-4
    assert "| attention, unet, dream queries | " in (tmp_path / "table.md").read_text()
