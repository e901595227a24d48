"""The work folder: it belongs to one recipe, and says which stages are done."""

import json

import pytest

from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.train.run_folder import RunFolder, read_recipe
from tests.train.tiny_recipe import RECIPE, changed


def test_a_run_may_change_how_it_is_computed(tmp_path):
    """The mesh, micro-batches, remat and hooks may change; what is learned may not."""
    written = to_dict(build_recipe(RECIPE))
    del written["stages"][0]["optim"]["gather"], written["hooks"]  # as a version without them wrote it
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    mapping = changed("mesh", dict(data=2, fsdp=4)) | {"log_every": 3, "checkpoint_every": 7}
    mapping["stages"][1]["optim"]["grad_accum_steps"] = 2
    mapping["model"] |= dict(remat=dict(llama="full"))
    mapping["hooks"] = dict(eval_every=10)
    RunFolder(tmp_path, build_recipe(mapping)).check()
    mapping["stages"][1]["optim"]["learning_rate"] = 2e-2
    with pytest.raises(ValueError, match="another recipe"):
        RunFolder(tmp_path, build_recipe(mapping)).check()


def test_a_folder_of_version_0_1(tmp_path):
    """Its recipe.json has the old keys."""
    written = to_dict(build_recipe(RECIPE))
    del written["hooks"]
    written["mesh"]["whole"] = written["mesh"].pop("replicated")
    for stage in written["stages"]:
        stage["data"]["rows"] = stage["data"].pop("batch_size")
        stage["optim"]["accumulation"] = stage["optim"].pop("grad_accum_steps")
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    RunFolder(tmp_path, build_recipe(RECIPE)).check()
    assert read_recipe(tmp_path / "recipe.json") == build_recipe(RECIPE)
    written["stages"][1]["data"]["rows"] = 16
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="another recipe"):
        RunFolder(tmp_path, build_recipe(RECIPE)).check()


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x", "epochs": 3}'])
def test_a_damaged_recipe_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe.json does not hold a recipe of this version"):
        RunFolder(tmp_path, build_recipe(RECIPE)).check()


def test_claiming_and_finishing(tmp_path):
    recipe = build_recipe(RECIPE)
    run = RunFolder(tmp_path / "run", recipe)
    run.check()
    run.claim()
    assert read_recipe(run.recipe_file) == recipe
    folder = run.stage(recipe.stages[1])
    assert folder.path == tmp_path / "run" / "stages" / "1_joint" and not folder.is_done()
    folder.states.mkdir(parents=True)
    folder.finish({"steps": 5})
    assert folder.is_done() and json.loads(folder.done_file.read_text()) == {"steps": 5}
    assert not folder.states.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        RunFolder(tmp_path / "file", recipe).check()
