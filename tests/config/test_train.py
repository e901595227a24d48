"""Recipes, stages, losses and optimizers: impossible values by their path."""

import pytest

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import (
    LossConfig,
    OptimConfig,
    Recipe,
    StageConfig,
    TokenizerConfig,
    build_recipe,
)


def stage(name="one", **changes):
    return StageConfig(name, ("llama",), 3, DataConfig(), **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossConfig(condition_dropout=1.0), "loss.condition_dropout is 1.0; it must lie in"),
        (lambda: LossConfig(logits_chunk=0), "loss.logits_chunk is 0; it must be at least 1"),
        (lambda: LossConfig(weight_vm=-1.0), "loss.weight_vm is -1.0; it must not be negative"),
        (lambda: LossConfig(snr_gamma=0.0), "loss.snr_gamma is 0.0; it must be positive, or None"),
        (lambda: OptimConfig(learning_rate=0.0), "optim.learning_rate is 0.0; it must be positive"),
        (lambda: OptimConfig(b2=1.0), "optim.b2 is 1.0; it must lie in"),
        (lambda: OptimConfig(warmup_ratio=2.0), "optim.warmup_ratio is 2.0"),
        (lambda: OptimConfig(grad_accum_steps=0), "optim.grad_accum_steps is 0"),
        (lambda: OptimConfig(clip_norm=0.0), "optim.clip_norm is 0.0; it must be positive, or None"),
        (lambda: StageConfig("one", ("llama",), 0, DataConfig()), "steps is 0; it must be at least 1"),
        (lambda: TokenizerConfig(path="x", corpus="texts:all_of_them"), "path .* or corpus .*, not both"),
        (lambda: Recipe("r", DreamLLMConfig(), (stage(), stage())), "two stages share a name"),
        (lambda: Recipe("r", DreamLLMConfig(), ()), "recipe 'r' has no stages"),
        (lambda: Recipe("r", DreamLLMConfig(), (stage(),), keep_checkpoints=0), "keep_checkpoints is 0"),
        (lambda: Recipe("r", DreamLLMConfig(), (stage(),), seed=1 << 32), "seed is 4294967296; it must lie"),
    ],
)
def test_impossible_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_stages_by_name():
    built = Recipe("r", DreamLLMConfig(), (stage("one"), stage("two")))
    assert built.stage("two") is built.stages[1]
    with pytest.raises(ValueError, match="has no stage 'three'; its stages: one, two"):
        built.stage("three")


def test_stages_share_a_program_that_differ_in_name_length_data_and_rates_only():
    first = stage("one", optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1))
    other = StageConfig(
        "two",
        ("llama",),
        9,
        DataConfig(batch_size=4),
        optim=OptimConfig(learning_rate=1e-4, weight_decay=0.1),
    )
    assert first.compile_key() == other.compile_key() != stage("one").compile_key()
    assert (
        first.compile_key() != stage("one", loss=LossConfig(weight_vm=1.0), optim=first.optim).compile_key()
    )


def test_a_recipe_from_a_mapping():
    mapping = {
        "name": "r",
        "model": {},
        "stages": [{"name": "a", "trainable": ["llama"], "steps": 1, "data": {}}],
    }
    assert build_recipe(mapping).stages[0].trainable == ("llama",)
    with pytest.raises(ValueError, match=r"stages\[0\]: key 'steps' is missing"):
        build_recipe(mapping | {"stages": [{"name": "a", "trainable": [], "data": {}}]})
