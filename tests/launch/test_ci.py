"""Continuous integration: a valid workflow of every supported Python and JAX; the same checks everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".github" / "workflows" / "ci.yml"
WORKFLOW = yaml.safe_load(FILE.read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
# JAX 0.12 needs Python 3.12.
JAX = {"3.11": ("0.10.2",), "3.12": ("0.10.2", "0.12.*"), "3.13": ("0.10.2", "0.12.*")}
RUN = (ROOT / ".ci" / "run").read_text()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflow_is_valid(schema):
    """Against GitHub's schema, which comes with check-jsonschema; every job has a time limit."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_python_with_the_lowest_and_the_newest_jax():
    found = [
        (one["python"], one["jax"]) for one in WORKFLOW["jobs"]["checks"]["strategy"]["matrix"]["include"]
    ]
    assert found == [(python, jax) for python in PYTHONS for jax in JAX[python]]
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python ::" in line]
    assert tuple(named) == PYTHONS and PROJECT["requires-python"] == ">=3.11,<3.14"


def test_those_are_the_bounds_of_pyproject():
    (allowed,) = (line for line in PROJECT["dependencies"] if re.match(r"jax\W", line))
    lowest, after = re.fullmatch(r"jax>=([\d.]+),<0\.(\d+)", allowed).groups()
    assert {versions[0] for versions in JAX.values()} == {lowest}
    assert {versions[-1] for versions in JAX.values() if len(versions) > 1} == {f"0.{int(after) - 1}.*"}


def test_the_jobs_run_what_a_contributor_runs():
    """Commands of the workflow are files of the repository; the tested JAX reaches .ci/run."""
    jobs = WORKFLOW["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for command in commands:
        program, *arguments = command.split()
        assert (ROOT / program).exists() and all((ROOT / path).exists() for path in arguments)
    assert ".ci/run" in commands and jobs["checks"]["env"] == {
        "JAX_VERSION": "${{ matrix.jax }}",
        "DREAMLLM_TORCH": "${{ matrix.torch }}",
    }
    assert '"jax[tpu,cuda13-local]==$JAX_VERSION"' in RUN


def test_pre_commit_runs_what_ci_runs():
    """Each tool of .ci/run is a hook, with the same arguments, and the other way round."""
    tools = set(re.findall(r'^ *"\$python" -m (.+)$', RUN, re.M)) | set(
        re.findall(r"^exec (\S+)$", RUN, re.M)
    )
    hooks = {hook["entry"].removeprefix(".venv/bin/python -m ") for hook in HOOKS}
    hooks = {hook.replace(" --force-exclude", "") for hook in hooks}
    tools = {tool.removesuffix(' --pythonpath "$python"').removesuffix(" .") for tool in tools}
    assert {hook.removesuffix(" --pythonpath .venv/bin/python") for hook in hooks} == tools
    assert len(tools) >= 4


def test_spelling():
    done = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_job_compares_with_pytorch():
    """Without `torch: "1"` the parity tests are skipped where pip knows only CUDA builds."""
    include = WORKFLOW["jobs"]["checks"]["strategy"]["matrix"]["include"]
    assert [job["python"] for job in include if "torch" in job and job["torch"] == "1"] == ["3.11"]
    assert "import diffusers, torch" in RUN
