"""int8 weights: the rounding, the products, and the model that generates with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.checkpoint.parameter_files import as_tensors
from dreamllm_jax.generate.api import DreamLLM
from dreamllm_jax.generate.int8 import round_to_int8, rounded
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.generate.prompts import prompt_batch
from dreamllm_jax.models.dreamllm import DreamLLMModule


def test_an_error_is_half_a_step_of_the_channel():
    kernel = np.random.default_rng(0).normal(size=(64, 2, 5)).astype(np.float32)
    kernel[:, 1, 2] = 0  # an empty channel
    kernel[:, 0, 0] *= 1e-20
    values, scale = rounded(kernel)
    assert values.dtype == np.int8 and scale.shape == (2, 5) and np.abs(values).max() == 127
    step = np.abs(kernel).max(0) / 127
    assert (np.abs(values * scale - kernel) <= step / 2 * 1.0001).all()
    for ours, theirs in zip((values, scale), rounded(jnp.asarray(kernel)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_tensors_that_are_not_read_are_rounded_when_they_are(model):
    params = generation_layout(flatten_dict(model.params, sep="/"), model.config.llama)
    now, later = round_to_int8(params), round_to_int8(as_tensors(params))
    assert now.keys() == later.keys()
    int8 = {path for path, value in now.items() if value.dtype == jnp.int8}
    assert len(int8) == 4 * 2 + 1 and "llama/lm_head/kernel" in int8
    for path, tensor in reversed(later.items()):  # the scales before their kernels
        assert (tensor.shape, tensor.dtype) == (now[path].shape, now[path].dtype), path
        np.testing.assert_allclose(tensor.read(), now[path], rtol=1e-6, err_msg=path)
    np.testing.assert_array_equal(later["llama/lm_head/kernel"].read(3, 5), now["llama/lm_head/kernel"][3:5])


def logits(model, prompts):
    engine = model._engine
    state = engine.read(prompt_batch(prompts, model.tokenizer, model.config, None), 64)
    run = jax.jit(lambda p, x: engine.module.apply({"params": p}, x[:, None], method=DreamLLMModule.logits))
    return np.asarray(run(engine.params, state.last))[:, 0]


def test_a_model_computes_with_the_rounded_weights(model):
    prompts = ["one", "Count from three to six."]
    arguments = (model.config, model.params, model.tokenizer, model.generation)
    int8 = DreamLLM(*arguments, quantize="int8")
    # The same model in floating point, with weights that are already rounded.
    flat = flatten_dict(int8._engine.params, sep="/")
    exact = {
        path: value * flat[f"{path}_scale"] if value.dtype == jnp.int8 else value
        for path, value in flat.items()
        if not path.endswith("kernel_scale")
    }
    equal = DreamLLM(*arguments)
    equal._engine.params.clear()
    equal._engine.params.update(unflatten_dict(exact, sep="/"))
    found = logits(int8, prompts)
    np.testing.assert_allclose(found, logits(equal, prompts), atol=2e-4)
    full = logits(model, prompts)
    assert 0 < np.abs(found - full).max() < 0.05 * np.abs(full).max()
    assert [isinstance(text, str) for text in int8.generate_text(prompts, max_new_tokens=3)] == [True, True]


def test_rounded_weights_are_not_saved(model, tmp_path):
    int8 = DreamLLM(model.config, model.params, model.tokenizer, model.generation, quantize="int8")
    for save in (lambda: int8.save_pretrained(tmp_path / "model"), lambda: int8.params):
        with pytest.raises(ValueError, match="weights are rounded to int8, .* load it without `quantize`"):
            save()
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="quantize is 'int4'; it must be 'int8' or None"):
        DreamLLM(model.config, model.params, model.tokenizer, quantize="int4")


def test_a_saved_model_is_rounded_while_it_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = DreamLLM.from_pretrained(tmp_path / "model", quantize="int8")
    here = DreamLLM(model.config, model.params, model.tokenizer, model.generation, quantize="int8")
    for path, value in flatten_dict(here._engine.params, sep="/").items():
        np.testing.assert_allclose(
            flatten_dict(loaded._engine.params, sep="/")[path], value, rtol=1e-6, err_msg=path
        )
