"""Opening models: saved folders, PyTorch checkpoints, and the hub."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax import DreamLLM
from dreamllm_jax.checkpoint.model_folder import open_pretrained, save_pretrained
from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.convert.folders import convert_to_jax
from dreamllm_jax.convert.opening import open_model
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.sharding import make_mesh
from tests.folders import load_pretrained


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_to_jax(open_checkpoint(golden / "dreamllm-a" / "checkpoint"), folder)
    return folder


def test_a_published_folder_loads_as_its_conversion_does(golden, converted):
    source, ours = (load_pretrained(p) for p in (golden / "dreamllm-a" / "checkpoint", converted))
    assert source.config == ours.config and source.generation == ours.generation
    assert source.tokenizer.special == ours.tokenizer.special
    assert source.generation.template == "vicuna_v1.1"
    assert source.params.keys() == ours.params.keys()
    for path, value in ours.params.items():
        np.testing.assert_array_equal(source.params[path], value, err_msg=path)


def test_it_is_sharded_as_it_is_read(golden, converted, devices):
    """Parameters are sharded over the devices, and the model generates what it does on one device."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)
    sharded = DreamLLM.from_pretrained(golden / "dreamllm-a" / "checkpoint", mesh=mesh)
    alone = DreamLLM.from_pretrained(converted)
    parts, full = flatten_dict(sharded.params, sep="/"), flatten_dict(alone.params, sep="/")
    split = 0
    for path, value in full.items():
        np.testing.assert_array_equal(np.asarray(parts[path]), np.asarray(value), err_msg=path)
        split += parts[path].addressable_shards[0].data.size < value.size
    assert split > len(full) / 3
    assert sharded.generate_text("hello", max_new_tokens=4) == alone.generate_text("hello", max_new_tokens=4)


def test_dtype_and_unread_tensors(golden):
    opened = open_model(golden / "dreamllm-a" / "checkpoint", dtype="bfloat16")
    assert {str(t.dtype) for t in opened.params.values()} == {"bfloat16"}
    model = DreamLLM.from_pretrained(golden / "dreamllm-a" / "checkpoint", dtype="bfloat16")
    assert str(model.params["llama"]["norm"]["scale"].dtype) == model.config.dtype == "bfloat16"


def test_kernels_stay_where_the_model_was_trained(converted, tmp_path):
    """A model that was trained with a TPU kernel is saved without it, and runs everywhere."""
    opened = open_pretrained(converted)
    trained = dataclasses.replace(opened.config, attention=AttentionConfig(llama="splash"))
    params = {path: tensor.read() for path, tensor in opened.params.items()}
    save_pretrained(tmp_path / "saved", params, trained, opened.tokenizer, opened.generation)
    assert open_pretrained(tmp_path / "saved").config == opened.config


def test_a_model_loads_where_its_sampler_is_not_installed(converted, tmp_path):
    """Only drawing needs the sampler; another one may be given."""
    opened = open_pretrained(converted)
    params = {path: tensor.read() for path, tensor in opened.params.items()}
    settings = dataclasses.replace(opened.generation, sampler="theirs", num_inference_steps=2)
    save_pretrained(tmp_path / "saved", params, opened.config, opened.tokenizer, settings)
    model = DreamLLM.from_pretrained(tmp_path / "saved")
    assert model.generation.sampler == "theirs" and model.generate_text("hello", max_new_tokens=2)
    with pytest.raises(ValueError, match="Unknown sampler 'theirs'"):
        model.generate_images("one")
    assert len(model.generate_images("one", sampler="ddim")) == 1


def test_what_cannot_be_loaded(golden, tmp_path):
    for path, words in (
        (tmp_path / "nowhere", "does not exist; give a folder of weights, or the id of a model on the hub"),
        (golden / "sequences.json", "is a file; give a folder"),
        (tmp_path, "has no config.json"),
        ("someone/some-model", "someone/some-model does not exist as a folder, and could not be downloaded"),
        (golden / "dreamllm-a" / "parts" / "clip", "has no weights"),
    ):
        with pytest.raises(ValueError, match=words):
            open_model(path)
