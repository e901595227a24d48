"""Invalid checkpoints, targets and configs: one sentence names the fault before anything is written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreamllm_jax.checkpoint.json_files import write_json
from dreamllm_jax.checkpoint.parameter_files import open_params, save_params
from dreamllm_jax.checkpoint.safetensors_files import write_safetensors
from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.pickles import read_pickle
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.convert.torch_files import write_torch_file
from tests.convert.test_convert import command
from tests.folders import take_towers


@pytest.fixture
def source(golden, tmp_path):
    """Returns a copy of a checkpoint, which a test can damage."""
    shutil.copytree(golden / "dreamllm-b", tmp_path / "b")
    return tmp_path / "b" / "checkpoint"


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "jax"
    convert_to_jax(open_checkpoint(golden / "dreamllm-a" / "checkpoint"), folder)
    return folder


def rewrite(file, edit):
    """Replaces a pickle by a safetensors file with its tensors, edited."""
    tensors = {name: t.read() for name, t in read_pickle(file)[0].items()}
    edit(tensors)
    file.unlink()
    edited = {name: ArrayTensor(name, value) for name, value in tensors.items()}
    write_safetensors(file.with_suffix(".safetensors"), edited)


def test_tensors_of_another_rank_or_with_too_much_in_an_axis(source):
    """All faulty tensors are named, and none is truncated silently."""

    def queries(tensors):
        tensors["dream_queries"] = np.repeat(tensors["dream_queries"], 2, axis=0)

    def head(tensors):
        tensors["unet.conv_in.weight"] = tensors["unet.conv_in.weight"][:, :, 0, 0]
        name = next(n for n in tensors if n.endswith("proj_in.weight"))
        tensors[name] = tensors[name].reshape(*tensors[name].shape[:2], 1)

    rewrite(source / "dream_embedding.bin", queries)
    rewrite(source / "stable_diffusion_head.bin", head)
    report = open_checkpoint(source).params()[1]
    assert len(report.misshapen) == 2 and report.faulty
    assert any("proj_in.weight (16, 16, 1)" in line for line in report.unexpected)
    assert any("dream_queries (2, 8, 96) cannot become dream_queries" in line for line in report.misshapen)
    assert any(
        "unet.conv_in.weight" in line and "cannot become unet/conv_in" in line for line in report.misshapen
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("llama/norm/scale"), "llama/norm/scale is missing"),
        (
            lambda p: p.update({"llama/norm/scale": np.ones(61, np.float32)}),
            r"has shape \(61,\), not \(64,\)",
        ),
        (lambda p: [p.pop(k) for k in list(p) if k.startswith("vae/")], "vae/decoder.* and 1?[0-9]+ more"),
        (lambda p: p.update({"llama/more": np.ones(2, np.float32)}), "llama/more does not belong to it"),
    ],
)
def test_an_incomplete_model_is_not_exported(change, words, converted, tmp_path):
    params = {path: t.read() for path, t in open_params(converted).items()}
    change(params)
    save_params(tmp_path / "jax", params)
    shutil.copy(converted / "config.json", tmp_path / "jax")
    with pytest.raises(ValueError, match=words):
        convert_to_torch(tmp_path / "jax", tmp_path / "torch")
    assert not (tmp_path / "torch").exists()


def test_a_config_of_another_model_is_not_exported(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "jax")
    content = json.loads((tmp_path / "jax/config.json").read_text())
    content["model"] |= {"vision": None, "unet": None, "vae": None}
    (tmp_path / "jax/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not belong to it"):
        convert_to_torch(tmp_path / "jax", tmp_path / "torch")


def edited(source, edit):
    raw = json.loads((source / "config.json").read_text())
    edit(raw, raw["plugins_init_kwargs"])
    (source / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda r, p: p["clip_vision_embedding"].update(projector_type="qformer"),
            "'qformer' is not supported",
        ),
        (
            lambda r, p: r.update(rope_scaling={"type": "linear"}),
            "Missing required keys .*'linear': {'factor'}",
        ),
        (lambda r, p: r.update(rope_scaling="linear"), "rope_scaling is 'linear'; expected an object"),
        (lambda r, p: r.update(plugins_init_kwargs=[1]), r"plugins_init_kwargs is \[1\]; expected an object"),
        (lambda r, p: r.update(special_tokens2ids_dict=["x"]), "special_tokens2ids_dict is .*; expected"),
        (
            lambda r, p: p["dream_embedding"].update(num_dream_queries="x"),
            "num_dream_queries is 'x'; expected",
        ),
        (
            lambda r, p: p["stable_diffusion_head"].update(snr_gamma="5"),
            "snr_gamma is '5'; expected a number",
        ),
        (lambda r, p: r.update(loss_weight_lm=None), "loss_weight_lm is None; expected a number"),
        (
            lambda r, p: p["clip_vision_embedding"].update(select_layer=7),
            "vision_select_layer is 7; the vision",
        ),
        (lambda r, p: r.update(num_attention_heads="many"), "'num_attention_heads' expected int, got str"),
        (lambda r, p: r.pop("model_type") and r.update(plugins_init_kwargs=None), "model_type=''; supported"),
    ],
)
def test_configs_that_cannot_be_used(edit, words, source, tmp_path, capsys):
    edited(source, edit)
    assert command("to-jax", source, tmp_path / "out", "--quiet") == 2
    message = capsys.readouterr().err
    assert str(source) in message and "Traceback" not in message
    with pytest.raises(ValueError, match=words):
        open_checkpoint(source)
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_reported(source, capsys):
    edited(source, lambda r, p: p["stable_diffusion_head"].update(tune_unet=True))
    assert command("inspect", source) == 0
    assert "stable_diffusion_head.tune_unet is an unknown option" in capsys.readouterr().out


def test_overwriting_destroys_no_source_and_nothing_else_than_a_model(source, converted, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    for direction, given, target, words in (
        ("to-jax", source, tmp_path / "precious", "contains something other than a model"),
        ("to-jax", source, source, "contains the source of the conversion"),
        ("to-jax", source, source.parent, "contains the source of the conversion"),
        ("to-torch", converted, converted, "contains the source of the conversion"),
        ("to-torch", converted, tmp_path / "precious", "contains something other than a model"),
    ):
        assert command(direction, given, target, "--quiet", "--overwrite") == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years" and open_params(converted)
    assert command("to-jax", source, tmp_path / "out", "--quiet") == 0
    assert command("to-jax", source, tmp_path / "out", "--quiet") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert command("to-jax", source, tmp_path / "out", "--quiet", "--overwrite") == 0


def in_shards(source, suffix):
    """Splits the language model's file into two shards with an index, as transformers does."""
    (whole,) = (f for f in source.iterdir() if f.name.startswith(("model.", "pytorch_model.")))
    tensors = load_file(whole) if whole.suffix == ".safetensors" else None
    if tensors is None:
        tensors = {name: t.read() for name, t in read_pickle(whole)[0].items()}
    whole.unlink()
    stem, names = ("model" if suffix == "safetensors" else "pytorch_model"), sorted(tensors)
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    halves = names[::2], names[1::2]
    for file, half in zip(files, halves, strict=True):
        part = {name: np.ascontiguousarray(tensors[name]) for name in half}
        if suffix == "safetensors":
            save_file(part, source / file)
        else:
            write_torch_file(source / file, {name: ArrayTensor(name, value) for name, value in part.items()})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    write_json(source / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})
    return files


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("bin", marks=pytest.mark.parity)])
def test_shards_of_a_source(suffix, golden, source, tmp_path, capsys):
    """Shards are read through their index; a truncated, missing or duplicate one is named."""
    if suffix == "bin":
        pytest.importorskip("torch")
    before = {path: t.read() for path, t in open_checkpoint(source).params()[0].items()}
    first, second = in_shards(source, suffix)
    params, report = open_checkpoint(source).params()
    assert not report.faulty
    for path, value in before.items():
        np.testing.assert_array_equal(params[path].read(), value, err_msg=path)
    data = (source / first).read_bytes()
    for content, words in (
        (data[: len(data) // 2], f"{first}"),
        (None, f"{first} missing; download the rest"),
    ):
        (source / first).unlink()
        if content is not None:
            (source / first).write_bytes(content)
        assert command("to-jax", source, tmp_path / "out", "--quiet") == 2
        assert words in capsys.readouterr().err
    shutil.copy(source / second, source / first)
    assert command("to-jax", source, tmp_path / "out", "--quiet") == 2
    assert "in two shards" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_a_pipeline_has_beside_its_model_is_listed(converted, tmp_path):
    pipeline = tmp_path / "pipeline"
    convert_to_torch(take_towers(converted, tmp_path / "jax", "unet", "vae"), pipeline)
    (pipeline / "text_encoder_2").mkdir()
    ignored = open_checkpoint(pipeline).params()[1].ignored
    assert any(line.endswith("text_encoder_2 (not part of the model)") for line in ignored)


def test_the_progress_bar_shows_bytes_and_rate(source, tmp_path, capsys):
    assert command("to-jax", source, tmp_path / "out") == 0
    shown = capsys.readouterr().err
    assert "100%" in shown and "B/s" in shown and "M/" in shown
