"""launch/README.md: it knows every script and every recipe, and its commands can be run."""

import re
import shlex
from pathlib import Path

import pytest

from dreamllm_jax.config.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "launch" / "README.md").read_text()
CHIPS = {"v5p:4x4x4": 64, "v5e:16x16": 256}
CHIPS |= {"h100:1": 1, "h200:1": 1, "h100:8": 8, "h100:8*8": 64}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    part = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_script_has_its_line():
    here = {path.name for path in (ROOT / "launch").iterdir() if path.is_file()} - {"README.md"}
    told = {cells[0].strip("`") for heading in ("On this machine", "On clusters") for cells in rows(heading)}
    assert told == here - {"python.sh", "cluster.sh"}  # which the others share


def test_what_is_named_is_there():
    named = set(re.findall(r"(?:launch|configs|tests)/[\w./-]*\w", TEXT))
    assert not {name for name in named if not (ROOT / name).exists()}


def test_every_stage_of_every_recipe_has_a_row():
    told = {(name.group(1), stage or None) for name, stage in recipes()}
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.name == "common.py":  # not a recipe
            continue
        stages = [stage.name for stage in load_recipe(str(path), []).stages]
        expected = [(path.name, None)] if len(stages) == 1 else [(path.name, stage) for stage in stages]
        assert set(expected) <= told, path.name
    assert ("examples/handwriting/config.py", "all") in told


def recipes() -> list[tuple[re.Match, str]]:
    cells = [row[0].partition(", ") for row in rows("Chips and seconds")]
    return [(re.fullmatch(r"`([\w/]+\.py)`", name), stage) for name, _, stage in cells]


@pytest.mark.parametrize("cells", rows("Chips and seconds"), ids=lambda cells: f"{cells[0]} on {cells[1]}")
def test_the_rows_agree_with_their_commands(cells):
    """The recipe takes the overrides; steps, chips and the mesh are those of the command."""
    name, chips, mesh, steps, _, _, source = cells
    if not source.startswith("`C "):
        assert chips in CHIPS or chips == "2 CPU cores"
        return
    file, _, stage = name.partition(", ")
    words = shlex.split(source.strip("`"))[1:]
    given = {"stage": ""} | dict(word[2:].split("=", 1) for word in words)
    assert given["config"] == f"configs/{file.strip('`')}" and given["topology"] == chips
    assert given["stage"] == stage
    recipe = load_recipe(
        str(ROOT / given["config"]), [word for word in words if word.startswith("--config.")]
    )
    (steps_of,) = (one.steps for one in recipe.stages if stage in ("", one.name))
    assert f"{steps_of:,}" == steps
    axes = {"data": "1", "fsdp": "1", "tensor": "1"} | dict(re.findall(r"(data|fsdp|tensor) (\d+)", mesh))
    axes = {name: int(size) for name, size in axes.items()}
    assert axes["data"] * axes["fsdp"] * axes["tensor"] == CHIPS[chips]
    assert recipe.mesh.data in (axes["data"], -1) and recipe.mesh.fsdp == axes["fsdp"]
    assert recipe.mesh.tensor == axes["tensor"]
