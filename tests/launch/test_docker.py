"""The Dockerfiles, read: sources are there, versions are pinned, and a rebuild is cheap."""

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {"tpu": ROOT / "launch" / "Dockerfile.tpu", "cuda": ROOT / "launch" / "Dockerfile.cuda"}
Instructions = list[tuple[str, str]]


def instructions(path: Path) -> Instructions:
    """(instruction, its words) of each, with lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def copied(found: Instructions) -> list[str]:
    """The sources of every COPY, which come from the folder of the repository."""
    sources = []
    for words in (rest.split() for name, rest in found if name == "COPY"):
        assert not words[0].startswith("--") and len(words) >= 2
        sources += words[:-1]
    return sources


def position(found: Instructions, name: str, part: str) -> int:
    (index,) = (i for i, (one, rest) in enumerate(found) if one == name and part in rest)
    return index


@pytest.fixture(params=FILES)
def image(request) -> tuple[str, Instructions]:
    return request.param, instructions(FILES[request.param])


def test_base_is_pinned_and_has_its_constraints(image):
    """An exact version of Python, whose file of constraints is the one that pip gets."""
    extra, found = image
    (base,) = (rest for name, rest in found if name == "FROM")
    tag = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-[a-z]+", base)
    assert tag is not None, base
    pins = f"launch/constraints/py{tag[1].replace('.', '')}.txt"
    assert (ROOT / pins).exists()
    (install,) = (rest for name, rest in found if name == "RUN")
    assert f"--constraint {pins} --editable '.[{extra}]'" in install and install.count("pip install") == 1
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_sources_are_there_and_reach_docker(image):
    _, found = image
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied(found):
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept, f".dockerignore leaves {source} out"
    assert {"dreamllm_jax", "configs", "launch"} <= set(copied(found))


def test_nothing_else_reaches_docker():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    kept = {line[1:] for line in rules if line.startswith("!")}
    needed = {source.split("/")[0] for path in FILES.values() for source in copied(instructions(path))}
    assert kept == needed
    if tracked:  # a clone
        assert all(any(fnmatch(name, f"{one}*") for name in tracked) for one in kept)


def test_packages_are_installed_before_the_code_is_copied(image):
    """A change of the code keeps the layer of the packages; only what describes them comes before it."""
    _, found = image
    install = position(found, "RUN", "pip install")
    assert copied(found[:install]) == [
        "setup.py",
        "pyproject.toml",
        "dreamllm_jax/version.py",
        "launch/constraints",
    ]
    assert not [name for name, _ in found[install + 1 :] if name == "RUN"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"]):
        assert name in found[install][1], f"setuptools wants {name}"


def test_runs_as_nobody_in_particular(image):
    _, found = image
    (user,) = (rest for name, rest in found if name == "USER")
    assert user == "${RUN_AS}" and ("ARG", "RUN_AS=10001") in found
    assert position(found, "USER", "RUN_AS") > position(found, "RUN", "useradd --uid 10001")
    assert not any(name == "ADD" for name, _ in found)


def test_folder_and_command(image):
    """xpk.sh and gke_jobset.yaml count on the folder; the command is a module that is there."""
    _, found = image
    assert ("WORKDIR", "/opt/dreamllm_jax") in found
    assert "cd /opt/dreamllm_jax && " in (ROOT / "launch" / "xpk.sh").read_text()
    (command,) = (json.loads(rest) for name, rest in found if name == "CMD")
    assert command[:2] == ["python", "-m"] and (ROOT / command[2].replace(".", "/") / "__main__.py").exists()


def test_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint comes with the tests on Linux (x86_64) only")
    result = subprocess.run([hadolint, *FILES.values()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
