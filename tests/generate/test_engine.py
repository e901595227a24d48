"""The parts that all generation shares: seeds, and the tokens that decoding may write."""

import dataclasses

import jax
import numpy as np
import pytest

from dreamllm_jax.generate.engine import prompt_keys


def data(keys):
    return np.asarray(jax.random.key_data(keys)).tolist()


def test_a_prompt_of_a_batch_has_the_key_it_would_have_alone(monkeypatch):
    batch = data(prompt_keys(7, 3))
    assert batch == [data(prompt_keys(7 + i, 1))[0] for i in range(3)] == data(prompt_keys([7, 8, 9], 3))
    assert len({tuple(key) for key in batch}) == 3
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # no runtime type checks
    assert data(prompt_keys(np.int64(7), 1)) == data(prompt_keys(7, 1))


@pytest.mark.parametrize(
    ("seed", "prompts", "words"),
    [
        ([1, 2], 3, "2 seeds for 3 prompts"),
        ([1, 2.5], 2, "give an int, or a list of them"),
        (-1, 1, "seed -1 is not between 0 and 4294967295"),
        ([0, 2**32], 2, "seed 4294967296 is not between"),
    ],
)
def test_invalid_seeds(seed, prompts, words, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # no runtime type checks
    with pytest.raises(ValueError, match=words):
        prompt_keys(seed, prompts)


def test_only_text_its_end_and_dreams_can_be_written(model):
    engine, special = model._engine, model.tokenizer.special
    control = engine.control([special.eos], np.ones(1, bool), 5, model.generation)
    forbidden = np.flatnonzero(control.forbidden)
    ids = dataclasses.asdict(special)
    allowed = {ids.pop("eos"), ids.pop("dream_start")}
    beyond = range(model.tokenizer.vocab_size, model.config.llama.vocab_size)
    assert set(forbidden.tolist()) == {*ids.values(), *beyond} and not allowed & set(forbidden.tolist())


def test_drawings_are_seen_at_the_vision_towers_size(model):
    seen = model._engine.to_vision_input(np.full((2, 8, 8, 3), 200, np.uint8))
    size = model.config.vision.image_size
    assert seen.shape == (2, size, size, 3) and (np.asarray(seen) == 200).all()
