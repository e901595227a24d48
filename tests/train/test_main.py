"""The training command: recipes by file and variant, and one sentence for what is wrong."""

import sys
from pathlib import Path

import pytest

from dreamllm_jax.train import __main__ as command

HANDWRITING = str(Path(__file__).resolve().parents[2] / "configs" / "handwriting.py")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        command.main()
    return str(end.value)


def test_a_recipe_and_its_variant():
    whole, tiny = command.load_recipe(HANDWRITING), command.load_recipe(f"{HANDWRITING}:tiny")
    assert [s.name for s in whole.stages] == [s.name for s in tiny.stages]
    assert {s.steps for s in tiny.stages} == {4} and min(s.steps for s in whole.stages) > 100


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="there is no such file; give a recipe"):
        command.load_recipe(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="has no function get_config"):
        command.load_recipe(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="has no variant 'huge'"):
        command.load_recipe(f"{HANDWRITING}:huge")


def test_the_command_ends_in_a_sentence(monkeypatch, tmp_path):
    message = run(monkeypatch, "--config=nowhere.py", f"--workdir={tmp_path / 'a'}")
    assert message.startswith("error: --config=nowhere.py: there is no such file")
    message = run(monkeypatch, f"--config={HANDWRITING}", f"--workdir={tmp_path / 'a'}", "--until=stage9")
    assert "has no stage 'stage9'" in message
    (tmp_path / "file").write_text("")
    message = run(monkeypatch, f"--config={HANDWRITING}", f"--workdir={tmp_path / 'file'}")
    assert message.startswith("error: ") and "is a file; give a folder" in message
