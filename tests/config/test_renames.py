"""Files that version 0.1 saved still load; recipes must use today's names."""

import pytest

from dreamllm_jax.config.renames import RENAMED
from dreamllm_jax.config.train import MeshConfig, recipe

OLD = {
    "name": "old",
    "model": {
        "llama": {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    },
    "stages": [
        {
            "name": "one",
            "trainable": ["llama"],
            "steps": 1,
            "data": {"rows": 12},
            "optim": {"accumulation": 3},
        }
    ],
    "mesh": {"whole": ["vision"]},
}


def test_a_saved_recipe_of_0_1_loads():
    built = recipe(OLD, saved=True)
    assert built.stages[0].data.batch_size == 12 and built.stages[0].optim.grad_accum_steps == 3
    assert built.mesh == MeshConfig(replicated=("vision",))


def test_an_old_key_in_a_recipe_is_named_with_the_new_one():
    with pytest.raises(
        ValueError, match=r"stages\[0\].data: key 'rows' is now called 'batch_size'; rename it"
    ):
        recipe(OLD)


def test_new_names_are_not_old_ones():
    for table in RENAMED.values():
        assert not table.keys() & set(table.values())
