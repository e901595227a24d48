"""The mapping rules: every golden tensor maps to one parameter and back; faults are reported together."""

import dataclasses
import math

import numpy as np
import pytest

from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.towers import ProjectorConfig
from dreamllm_jax.convert.adapters.dreamllm import configs_from_dreamllm, read_dreamllm
from dreamllm_jax.convert.mapping import to_jax, to_torch
from dreamllm_jax.convert.patterns import TRANSFORMS, to_ours, to_theirs
from dreamllm_jax.convert.rules import RULES
from dreamllm_jax.models.parameters import parameter_shapes

FOLDERS = ("dreamllm-a", "dreamllm-b")


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_golden_tensor_lands_once_and_comes_back(golden, name):
    folder = golden / name / "checkpoint"
    settings = configs_from_dreamllm(folder)
    parts, found = read_dreamllm(folder, settings)
    expected = parameter_shapes(settings.model)
    params, report = to_jax(parts, expected)
    report.raise_if_faulty(name)
    assert not found.faulty and not found.ignored
    assert list(params) == list(expected)
    assert {path: tensor.shape for path, tensor in params.items()} == expected
    assert len(report.ignored) == settings.model.llama.num_hidden_layers
    assert all("rotary_emb.inv_freq" in line for line in report.ignored)
    arrays = {path: ArrayTensor(path, tensor.read()) for path, tensor in params.items()}
    back, faults = to_torch(arrays)
    assert not faults.faulty
    for part, tensors in parts.items():
        kept = {name for name in tensors if "inv_freq" not in name}
        assert set(back[part]) == kept
        for key in kept:
            assert back[part][key].shape == tensors[key].shape
            np.testing.assert_array_equal(bits(back[part][key].read()), bits(tensors[key].read()), key)


def test_settings_of_the_goldens(golden):
    a = configs_from_dreamllm(golden / "dreamllm-a/checkpoint")
    b = configs_from_dreamllm(golden / "dreamllm-b/checkpoint", golden / "dreamllm-b/parts")
    assert (a.loss.snr_gamma, b.loss.snr_gamma) == (5.0, None)
    assert (a.loss.weight_lm, a.loss.weight_vm, a.loss.scale, a.loss.condition_dropout) == (1, 10, "none", 0)
    assert a.model.num_dream_queries == 8 and a.model.vision_select_layer == -2 and a.model.image_size == 32
    assert a.model.vision_projector == ProjectorConfig("linear", 1, True)
    assert b.model.vision_projector == ProjectorConfig("mlp", 2, True)
    assert a.model.condition_projector == ProjectorConfig("linear", 1, False)
    assert (a.model.schedule.prediction_type, b.model.schedule.prediction_type) == ("epsilon", "v_prediction")
    assert a.model.unet.attention_head_dim == (2, 4) and b.model.llama.num_key_value_heads == 2


@pytest.mark.parametrize("kind", [("linear", 1), ("mlp", 2), ("mlp", 4), ("conv", 1), ("sam", 2)])
def test_projectors_of_every_kind(golden, kind):
    model = configs_from_dreamllm(golden / "dreamllm-a/checkpoint").model
    config = ProjectorConfig(*kind, bias=kind[0] != "sam")
    shapes = parameter_shapes(DreamLLMConfig(llama=model.llama, vision=model.vision, vision_projector=config))
    shapes = {path: shape for path, shape in shapes.items() if path.startswith("vision_projector/")}
    arrays = {
        path: ArrayTensor(path, np.random.default_rng(0).random(shape)) for path, shape in shapes.items()
    }
    parts, report = to_torch(arrays)
    assert not report.faulty and len(parts["vision_projector"]) == len(arrays)
    names = {
        "linear": {"projector.weight", "projector.bias"},
        "conv": {"projector.weight", "projector.bias"},
        "sam": {"projector.0.weight", "projector.1.weight", "mlp.weight"},
        "mlp": {f"projector.{2 * i}.{leaf}" for i in range(kind[1]) for leaf in ("weight", "bias")},
    }
    assert set(parts["vision_projector"]) == names[kind[0]]
    again, report = to_jax(parts, shapes)
    assert not report.faulty
    for path, tensor in arrays.items():
        np.testing.assert_array_equal(again[path].read(), tensor.read())


def test_faults_are_reported_together_by_name_and_shape(golden):
    folder = golden / "dreamllm-a/checkpoint"
    settings = configs_from_dreamllm(folder)
    parts, _ = read_dreamllm(folder, settings)
    expected = {p: s for p, s in parameter_shapes(settings.model).items() if p.startswith("llama/")}
    llama = dict(parts["llama"])
    del llama["model.norm.weight"]
    del llama["model.layers.1.mlp.up_proj.weight"]
    llama["model.layers.2.mlp.up_proj.weight"] = llama["model.layers.0.mlp.up_proj.weight"]
    llama["surprise.weight"] = ArrayTensor("surprise.weight", np.zeros((2, 3)))
    llama["lm_head.weight"] = ArrayTensor("lm_head.weight", np.zeros((5, 64)))
    _, report = to_jax({"llama": llama, "vae": parts["vae"]}, expected)
    text = str(report)
    assert "llama/norm/scale (64,)" in text
    assert "llama/layers/mlp/up_proj/kernel, layer 1 (64, 160)" in text
    assert "surprise.weight (2, 3)" in text and "(the model has 2 layers)" in text
    assert "lm_head.weight (5, 64) becomes (64, 5); llama/lm_head/kernel needs (64, 520)" in text
    assert "(the model has no vae)" in text
    assert [len(report.missing), len(report.unexpected), len(report.misshapen)] == [2, 2, 1]
    with pytest.raises(ValueError, match="dreamllm-a does not fit"):
        report.raise_if_faulty("dreamllm-a")


def test_two_names_of_one_parameter_are_a_duplicate(golden):
    queries = {
        "dream_queries": ArrayTensor("new", np.zeros((1, 8, 4))),
    }
    expected = {"dream_queries/dream_queries": (8, 4)}
    assert not to_jax({"dream_queries": queries}, expected)[1].faulty
    heads = {
        "encoder.mid_block.attentions.0.to_q.weight": ArrayTensor("new", np.zeros((4, 4))),
        "encoder.mid_block.attentions.0.query.weight": ArrayTensor("old", np.zeros((4, 4))),
    }
    _, report = to_jax({"vae": heads}, {"vae/encoder/mid_block/attentions_0/to_q/kernel": (4, 4)})
    assert report.duplicate == [
        "old (4, 4) and new (4, 4) are both vae/encoder/mid_block/attentions_0/to_q/kernel"
    ]


def test_a_tied_output_layer_is_ignored(golden):
    folder = golden / "dreamllm-a/checkpoint"
    settings = configs_from_dreamllm(folder)
    tied = dataclasses.replace(settings.model.llama, tie_word_embeddings=True)
    parts, _ = read_dreamllm(folder, settings)
    _, report = to_jax({"llama": parts["llama"]}, parameter_shapes(DreamLLMConfig(llama=tied)))
    assert not report.faulty and any("lm_head.weight" in line for line in report.ignored)


def test_paths_are_spelled_both_ways():
    for theirs, ours in [
        ("down_blocks.0.resnets.1.conv1", "down_blocks_0/resnets_1/conv1"),
        ("time_embedding.linear_1", "time_embedding/linear_1"),
        ("ff.net.0.proj", "ff/net_0/proj"),
        ("attn1.to_out.0", "attn1/to_out_0"),
    ]:
        assert to_ours(theirs) == ours and to_theirs(ours) == theirs


def test_transforms_are_undone_exactly():
    for name, shape in [("same", (2, 3)), ("linear", (2, 3)), ("conv", (2, 3, 4, 5)), ("unbatch", (1, 2, 3))]:
        x = np.random.default_rng(0).random(shape)
        np.testing.assert_array_equal(TRANSFORMS[name].backward(TRANSFORMS[name].forward(x)), x)
    x = np.random.default_rng(0).random((2, 3, 1, 1))
    transform = TRANSFORMS["conv_as_linear"]
    np.testing.assert_array_equal(transform.backward(transform.forward(x)), x)


def test_every_part_of_the_tables_starts_its_targets_with_its_name():
    for part, rules in RULES.items():
        assert all(rule.target.startswith(f"{part}/") for rule in rules)
        assert len({(r.source, r.target, r.rank) for r in rules}) == len(rules)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plugins_init_kwargs": {"controlnet_head": {}}}, "plugin 'controlnet_head' is not supported"),
        ({"loss_scale_schedule": "magic"}, "loss_scale_schedule='magic'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_unsupported_options_are_named(tmp_path, golden, change, words):
    import json

    raw = json.loads((golden / "dreamllm-a/checkpoint/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=words):
        configs_from_dreamllm(tmp_path, golden / "dreamllm-a/parts")


def test_published_towers_are_known_without_their_folders(tmp_path, golden):
    import json

    raw = json.loads((golden / "dreamllm-a/checkpoint/config.json").read_text())
    plugins = raw["plugins_init_kwargs"]
    plugins["clip_vision_embedding"]["clip_vision_model_name_or_path"] = "openai/clip-vit-large-patch14"
    plugins["stable_diffusion_head"]["diffusion_name_or_path"] = "stabilityai/stable-diffusion-2-1-base"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = configs_from_dreamllm(tmp_path).model
    assert model.vision.num_patches == 256 and model.unet.cross_attention_dim == 1024
    plugins["stable_diffusion_head"].pop("resolution", None)
    for name, count, size in (  # the published numbers of parameters
        ("stable-diffusion-2-1-base", 865_910_724, 512),
        ("stable-diffusion-2-1", 865_910_724, 768),
        ("stable-diffusion-xl-base-1.0", 2_567_463_684, 1024),
    ):
        plugins["stable_diffusion_head"]["diffusion_name_or_path"] = f"stabilityai/{name}"
        (tmp_path / "config.json").write_text(json.dumps(raw))
        model = configs_from_dreamllm(tmp_path).model
        shapes = {path: s for path, s in parameter_shapes(model).items() if path.startswith("unet/")}
        assert sum(math.prod(shape) for shape in shapes.values()) == count and model.image_size == size
    plugins["stable_diffusion_head"]["diffusion_name_or_path"] = "somebody/else"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'somebody/else'.*not found"):
        configs_from_dreamllm(tmp_path)


def test_the_expected_shapes_are_those_of_the_whole_model(golden):
    from dreamllm_jax.models.parameters import abstract_params

    model = configs_from_dreamllm(golden / "dreamllm-b/checkpoint").model
    assert parameter_shapes(model) == {path: leaf.shape for path, leaf in abstract_params(model).items()}
