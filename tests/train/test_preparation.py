"""Preparation of a run: its tars are indexed once for all of its starts."""

import copy

import pytest

from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.data.formats import tar_index
from dreamllm_jax.train import loop, stage_progress
from tests.data.datasets import picture, write_tar
from tests.train.tiny_recipe import RECIPE


class Ready(Exception):
    """The data is open, and the run would continue."""


def test_tars_are_indexed_in_the_work_folder_by_the_first_start_alone(tmp_path, monkeypatch):
    read, members = [], tar_index.members
    monkeypatch.setattr(tar_index, "members", lambda path: read.append(path.name) or members(path))
    monkeypatch.setattr(loop, "initial_params", lambda recipe, open_model: (recipe.model, {}))

    def ready(folder, every, keep):
        raise Ready

    monkeypatch.setattr(stage_progress, "StageCheckpoints", ready)
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, {"0.png": picture(), "0.txt": b"a red field"})
    mapping = copy.deepcopy(RECIPE)
    data = mapping["stages"][1]["data"]
    del data["source"], data["source_options"]
    data["sources"] = [dict(format="pairs", path=f"{tmp_path}/{{0,1}}.tar")]
    mapping["stages"] = mapping["stages"][1:]
    for _ in range(2):
        with pytest.raises(Ready):
            loop.train(build_recipe(mapping), tmp_path / "run")
        assert read == ["0.tar", "1.tar"]
    assert len(list((tmp_path / "run" / "index").iterdir())) == 1
