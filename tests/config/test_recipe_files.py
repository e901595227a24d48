"""Recipe files: what `get_config` may return, and which modules it may import."""

import sys

import pytest
from ml_collections import ConfigDict

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.recipe_files import load_recipe, to_config_dict
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.config.train import Recipe, StageConfig, build_recipe
from tests.train.tiny_recipe import RECIPE

STAGE = StageConfig("one", ("llama",), 3, DataConfig())
FILE = """
from neighbour import LENGTH

def get_config(arg=None):
    stage = {"name": "one", "trainable": ["llama"], "steps": 1, "data": {"length": LENGTH}}
    return {"name": arg or "plain", "model": {}, "stages": [stage]}
"""


def test_a_typed_recipe_there_and_back():
    made = Recipe("r", DreamLLMConfig(llama=LlamaConfig(num_key_value_heads=8)), (STAGE,))
    config = to_config_dict(made)
    assert isinstance(config, ConfigDict) and build_recipe(config) == made
    assert config.model.llama.num_key_value_heads == 8
    assert config.model.llama.head_dim is None and made.model.llama.head_dim == 128  # derived


def test_values_that_cannot_be_derived_stay():
    """By themselves 100 / 8 heads would be refused, and 64 / 8 would have another size."""
    for width, size in ((100, 16), (64, 16)):
        llama = LlamaConfig(hidden_size=width, num_attention_heads=8, head_dim=size)
        config = to_config_dict(Recipe("r", DreamLLMConfig(llama=llama), (STAGE,)))
        assert config.model.llama.head_dim == 16


def test_neighbours_of_one_name_do_not_mix(tmp_path):
    for folder, length in (("a", 32), ("b", 64)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(FILE)
        (tmp_path / folder / "neighbour.py").write_text(f"LENGTH = {length}\n")
        recipe = load_recipe(f"{tmp_path / folder / 'mine.py'}:variant")
        assert (recipe.name, recipe.stages[0].data.length) == ("variant", length)
    assert "neighbour" not in sys.modules and not any(str(tmp_path) in path for path in sys.path)


def test_overrides_leave_the_mapping_of_a_file_as_it_was(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tests.train.tiny_recipe import RECIPE\n\ndef get_config(arg=None):\n    return RECIPE\n"
    )
    assert load_recipe(str(file), ["--config.stages.joint.steps=7"]).stages[1].steps == 7
    assert load_recipe(str(file)).stages[1].steps == RECIPE["stages"][1]["steps"] == 5


def test_files_that_are_not_recipes(tmp_path):
    with pytest.raises(ValueError, match="the file does not exist; give a recipe"):
        load_recipe(str(tmp_path / "no.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"the file has no function get_config\(arg\)"):
        load_recipe(str(tmp_path / "empty.py"))
