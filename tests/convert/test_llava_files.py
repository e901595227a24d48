"""LLaVA-1.5 in its authors' format: their names, their config, and a separate vision tower."""

import json
import shutil

import numpy as np
import pytest

from dreamllm_jax import DreamLLM
from dreamllm_jax.checkpoint.parameter_files import open_params
from dreamllm_jax.checkpoint.safetensors_files import write_safetensors
from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.config.towers import ClipVisionConfig, LlamaConfig
from dreamllm_jax.convert import foreign
from dreamllm_jax.convert.compose import compose
from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.recognize import open_checkpoint
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
    """Writes dreamllm-a without its decoder in LLaVA's format, with its vision tower in a sibling folder."""
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
    """Returns a copy of a folder with a changed config."""

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
    assert any("images are padded to squares; here they are cropped" in line for line in report.differing)


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
        (dict(mm_vision_select_layer=[-2, -5]), "a config.json has a value of an unexpected type"),
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
    assert any("config.json says that <s> is 7; the tokenizer says 1" in line for line in differing)
    assert any("config.json says that [PAD] is 99; the tokenizer says 512" in line for line in differing)


def test_a_tower_that_is_only_named_cannot_be_given(spoiled, golden):
    folder = spoiled(mm_vision_tower="openai/clip-vit-large-patch14")
    shutil.rmtree(folder.parent / "clip-small")
    llm = open_checkpoint(golden / "dreamllm-a" / "checkpoint")
    with pytest.raises(ValueError, match="only names its vision; give the tower's own folder"):
        compose(llm, vision=open_checkpoint(folder))


@pytest.fixture
def port(tmp_path):
    """Writes a config.json of the Hugging Face port with some changes; returns its folder."""

    def write(**changes):
        text = {
            "model_type": "llama",
            "vocab_size": 32064,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
        }
        vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16}
        vision |= {"intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}
        raw = {
            "model_type": "llava",
            "text_config": text,
            "vision_config": vision,
            "image_token_index": 32000,
        }
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        return tmp_path

    return write


def test_the_port_leaves_out_what_transformers_knows(port, monkeypatch):
    monkeypatch.setattr(foreign, "read_weights", lambda folder: {})
    source = open_checkpoint(port())
    assert source.model.llama == LlamaConfig(
        vocab_size=32064, rms_norm_eps=1e-5, max_position_embeddings=4096
    )
    # a file without the width of the projection means that of CLIP B/32; this model has no projection
    assert source.model.vision == ClipVisionConfig(image_size=336, projection_dim=512)
    assert source.model.vision_select_layer == -2 and source.stated == {"<image>": 32000}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(vision_feature_select_strategy="full"),
            "vision_feature_select_strategy='full' is not supported",
        ),
        (dict(projector_hidden_act="relu"), "projector_hidden_act='relu' is not supported"),
        (dict(multimodal_projector_bias=False), "multimodal_projector_bias=False is not supported"),
        (dict(vision_feature_layer=[-2, -5]), r"vision_feature_layer=\[-2, -5\] is not supported"),
        (
            dict(text_config={"model_type": "mistral"}),
            "model_type='mistral' is not supported; supported: 'llama'",
        ),
        (
            dict(vision_config={"model_type": "siglip_vision_model"}),
            "model_type='siglip_vision_model' is not supported; supported: 'clip_vision_model'",
        ),
        (
            dict(text_config={"model_type": "llama", "hidden_act": "gelu"}),
            "hidden_act='gelu' is not supported",
        ),
        (dict(text_config={"model_type": "nobody"}), "nobody"),
    ],
)
def test_what_the_port_has_that_is_not_supported(changes, words, port):
    folder = port(**changes)
    with pytest.raises(ValueError, match=words) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value)
