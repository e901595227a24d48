"""LLaVA-1.5 as its authors publish it: its own names, its own config, its tower apart."""

import json
import shutil

import numpy as np
import pytest

from dreamllm_jax import DreamLLM
from dreamllm_jax.checkpoint.parameter_files import open_params
from dreamllm_jax.checkpoint.safetensors_files import write_safetensors
from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.convert.compose import compose
from dreamllm_jax.convert.convert import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.sources import open_checkpoint
from tests.folders import take_towers

CONFIG = dict(
    mm_vision_tower="openai/clip-small",
    mm_projector_type="linear",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_use_im_start_end=False,
    image_aspect_ratio="pad",
)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """dreamllm-a without its decoder, in LLaVA's files, and its vision tower in a folder beside."""
    home = tmp_path_factory.mktemp("llava")
    convert_to_jax(open_checkpoint(golden / "dreamllm-a" / "checkpoint"), home / "jax")
    convert_to_torch(take_towers(home / "jax", home / "clip-jax", "vision"), home / "clip-small")
    folder = home / "llava"
    folder.mkdir()
    checkpoint = golden / "dreamllm-a" / "checkpoint"
    llama = open_checkpoint(checkpoint).parts
    tensors = {name: t.read() for name, t in llama["llama"].items()}
    for name, tensor in llama["vision_projector"].items():
        tensors[f"model.mm_projector.{name.removeprefix('projector.')}"] = tensor.read()
    write_safetensors(folder / "model.safetensors", {n: ArrayTensor(n, v) for n, v in tensors.items()})
    raw = json.loads((checkpoint / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if not k.startswith(("plugins", "special", "loss"))}
    (folder / "config.json").write_text(json.dumps(raw | CONFIG | {"model_type": "llava"}))
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(checkpoint / name, folder)
    return folder


@pytest.fixture
def spoiled(published, tmp_path):
    """A copy with a changed config."""

    def change(**changes):
        shutil.copytree(published.parent, tmp_path / "copy", dirs_exist_ok=True)
        path = tmp_path / "copy" / "llava" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path.parent

    return change


def test_its_tensors_find_their_places(published):
    source = open_checkpoint(published)
    params, report = source.params()
    assert source.kind == "LLaVA" and source.template == "vicuna_v1.1" and not report.faulty
    whole = open_params(published.parent / "jax")
    towers = ("llama/", "vision/", "vision_projector/")
    assert params.keys() == {path for path in whole if path.startswith(towers)}
    for path, tensor in params.items():
        np.testing.assert_array_equal(tensor.read(), whole[path].read(), err_msg=path)
    assert any("pictures are padded to squares; here they are cut" in line for line in report.differing)


def test_it_loads_and_writes(published):
    with pytest.warns(UserWarning, match="padded to squares"):
        model = DreamLLM.from_pretrained(published)
    assert model.config.sees and not model.config.draws
    assert isinstance(model.generate_text("hello", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature='cls_patch' is not supported"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end=True is not supported"),
        (dict(image_aspect_ratio="anyres"), "image_aspect_ratio='anyres' is not supported"),
        (dict(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type='spatial_unpad' is not supported"),
        (dict(mm_projector_type="mlpx_gelu"), "mm_projector_type='mlpx_gelu' is not supported"),
        (dict(mm_vision_tower="nobody/none"), "the vision tower 'nobody/none' was not found"),
        (dict(mm_vision_select_layer=[-2, -5]), "a config.json has a value of an unexpected kind"),
    ],
)
def test_options_that_are_not_supported(change, words, spoiled):
    folder = spoiled(**change)
    if "mm_vision_tower" in change:
        shutil.rmtree(folder.parent / "clip-small")
    with pytest.raises(ValueError, match=words):
        open_checkpoint(folder)


def test_ids_that_its_tokenizer_contradicts(spoiled):
    differing = open_checkpoint(spoiled(bos_token_id=7, pad_token_id=99)).params()[1].differing
    assert any("config.json says that <s> is 7; it is 1" in line for line in differing)
    assert any("config.json says that [PAD] is 99; it is 512" in line for line in differing)


def test_a_tower_that_is_only_named_cannot_be_given(spoiled, golden):
    folder = spoiled(mm_vision_tower="openai/clip-vit-large-patch14")
    shutil.rmtree(folder.parent / "clip-small")
    llm = open_checkpoint(golden / "dreamllm-a" / "checkpoint")
    with pytest.raises(ValueError, match="only names its vision; give its own folder"):
        compose(llm, vision=open_checkpoint(folder))
