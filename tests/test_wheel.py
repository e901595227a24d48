"""The wheel: built from the sources, installed into a fresh environment, and used outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dreamllm_jax.version import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that must succeed. It does not see the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources; building one leaves files beside them. Nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dreamllm_jax", folder / "source" / "dreamllm_jax", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, "./source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The programs of an environment into which the wheel was installed; it borrows our dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    (site,) = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).split(
        "\n"
    )[:1]
    # A path in a .pth file comes after the environment's own packages, and no .pth file of it is read: the
    # repository, which may be installed there for editing, is not found.
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return programs


def test_the_version_is_that_of_the_package(wheel):
    assert wheel.name == f"dreamllm_jax-{__version__}-py3-none-any.whl"


def test_everything_in_the_package_is_inside_and_nothing_else(wheel):
    """Templates and other files that are not Python too; neither tests nor configs."""
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "dreamllm_jax"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == wanted and "dreamllm_jax/py.typed" in inside


def test_the_installed_command(programs, tmp_path):
    assert run(programs / "dreamllm", "--help", cwd=tmp_path).startswith("usage: dreamllm ")
    assert run(programs / "dreamllm", "--version", cwd=tmp_path).startswith(f"dreamllm {__version__} (JAX ")
    shown = run(programs / "dreamllm", "train", "--help", cwd=tmp_path)
    assert "--config" in shown and "examples:" in shown


def test_the_installed_package(programs, tmp_path):
    """It is imported from the environment, with all that DreamLLM needs."""
    code = (
        "import importlib.metadata, dreamllm_jax; from dreamllm_jax import DreamLLM, Document;"
        "print(dreamllm_jax.__file__); print(DreamLLM.__name__, dreamllm_jax.__version__,"
        "importlib.metadata.version('dreamllm-jax'))"
    )
    where, rest = run(programs / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).resolve().is_relative_to(programs.parent.resolve())
    assert rest == f"DreamLLM {__version__} {__version__}"


def test_the_installed_command_converts_and_generates(programs, golden, tmp_path):
    """Without the repository: what the command reads and says lies in the wheel."""
    source = golden / "dreamllm-a" / "checkpoint"
    said = run(programs / "dreamllm", "convert", "to-jax", source, "model", "--quiet", cwd=tmp_path)
    assert "converted" in said
    options = "--max-new-tokens=4 --max-images=1 --num-inference-steps=1 --out=page.html".split()
    run(programs / "dreamllm", "generate", "model", "hello", *options, cwd=tmp_path)
    assert "<!doctype html>" in (tmp_path / "page.html").read_text(encoding="utf-8")
