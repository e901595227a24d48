"""Overrides from the command line."""

import pytest
from ml_collections import ConfigDict

from dreamllm_jax.config.overrides import apply_overrides


def recipe() -> ConfigDict:
    return ConfigDict({"seed": 0, "mesh": {"data": 1}, "stages": [{"name": "a", "steps": 1}, {"name": "b"}]})


def test_values_are_set_by_path_number_and_name():
    arguments = [
        "--config.seed=3",
        "--config.mesh.data=2",
        "--config.stages.a.steps=9",
        "--config.stages.1.x=y",
    ]
    result = apply_overrides(recipe(), arguments)
    assert (result.seed, result.mesh.data) == (3, 2)
    assert (result.stages[0]["steps"], result.stages[1]["x"]) == (9, "y")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--seed=3", "is not an override"),
        ("--config.seed", "is not an override"),
        ("--config.stages.c.steps=1", "its entries are a, b"),
        ("--config.seed.x=1", "has no keys"),
    ],
)
def test_a_wrong_override_is_one_sentence(argument, sentence):
    with pytest.raises(ValueError, match=sentence):
        apply_overrides(recipe(), [argument])
