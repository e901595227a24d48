"""The layout of parameters in generation, and the way back to a checkpoint's."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.checkpoint.parameter_files import as_tensors, open_params, save_params
from dreamllm_jax.checkpoint.tensors import Tensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import LlamaConfig
from dreamllm_jax.generate.layout import checkpoint_layout, generation_layout
from dreamllm_jax.models.parameters import parameter_shapes

LLAMA = LlamaConfig(64, 12, 16, 3, 6, 2, head_dim=4, attention_bias=True)


def checkpoint(config=LLAMA):
    """Returns distinct values at the shapes of a checkpoint's language model."""
    shapes = parameter_shapes(DreamLLMConfig(llama=config))
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("lazy", [False, True])
def test_the_way_back_is_exact(lazy):
    params = checkpoint()
    given = as_tensors(params) if lazy else params
    relaid = generation_layout(given, LLAMA)
    back = checkpoint_layout(relaid, LLAMA)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path].read() if lazy else back[path], value, err_msg=path)


def test_tensors_and_arrays_give_the_same_layout(tmp_path):
    params = checkpoint()
    save_params(tmp_path, params)
    arrays, tensors = (generation_layout(p, LLAMA) for p in (params, open_params(tmp_path)))
    assert arrays.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert isinstance(tensor, Tensor) and tensor.shape == arrays[path].shape, path
        np.testing.assert_array_equal(tensor.read(), arrays[path], err_msg=path)
        np.testing.assert_array_equal(tensor.read(1, 3), arrays[path][1:3], err_msg=path)


def test_a_group_has_the_query_heads_of_a_key_the_key_and_the_value():
    params = checkpoint()
    relaid = generation_layout(params, LLAMA)
    joined = relaid["llama/layers_1/self_attn/qkv_proj/kernel"]
    assert joined.shape == (12, (6 + 2 + 2) * 4)
    stacks = {name: params[f"llama/layers/self_attn/{name}_proj/kernel"] for name in "qkv"}
    heads = {name: stack[1].reshape(12, -1, 4) for name, stack in stacks.items()}
    second = joined.reshape(12, 2, 5, 4)[:, 1]
    np.testing.assert_array_equal(second[:, :3], heads["q"][:, 3:])
    np.testing.assert_array_equal(second[:, 3], heads["k"][:, 1])
    np.testing.assert_array_equal(second[:, 4], heads["v"][:, 1])
    both = relaid["llama/layers_1/mlp/gate_up_proj/kernel"]
    np.testing.assert_array_equal(both[:, 1], params["llama/layers/mlp/up_proj/kernel"][1])


def test_a_model_without_grouped_heads_or_biases_is_laid_out_too():
    config = dataclasses.replace(LLAMA, num_key_value_heads=6, attention_bias=False)
    relaid = generation_layout(checkpoint(config), config)
    assert "llama/layers_0/self_attn/qkv_proj/bias" not in relaid
    assert relaid["llama/layers_2/self_attn/qkv_proj/kernel"].shape == (12, 18 * 4)


def test_a_model_saves_the_checkpoint_that_it_was_made_from(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    saved = open_params(tmp_path / "model")
    params = flatten_dict(model.params, sep="/")
    assert saved.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(saved[path].read(), value, err_msg=path)
