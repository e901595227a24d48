"""The command in both directions: recognized sources, exact round trips, and folders that PyTorch loads."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from dreamllm_jax.checkpoint.model_folder import save_pretrained
from dreamllm_jax.checkpoint.parameter_files import open_params
from dreamllm_jax.checkpoint.safetensors_files import read_safetensors
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.inspect import describe
from dreamllm_jax.convert.opening import open_model
from dreamllm_jax.convert.pickles import read_pickle
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.data.tokenizer import train_tokenizer
from tests.train import tiny

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"


def command(*arguments) -> int:
    spec = importlib.util.spec_from_file_location("convert_weights", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(a) for a in arguments])


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder's checkpoint files, named `role: name`."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".safetensors"):
            tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)[0]
            role = "llm" if file.stem.startswith(("pytorch_model", "model")) else file.stem
            found |= {f"{role}: {name}": tensor.read() for name, tensor in tensors.items()}
    return found


def assert_same_bits(ours: dict, theirs: dict):
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(
            ours[name].reshape(-1).view(np.uint8), theirs[name].reshape(-1).view(np.uint8)
        )


@pytest.mark.parametrize("name", ["dreamllm-a", "dreamllm-b"])
def test_there_and_back_gives_the_same_bits(tmp_path, golden, name, capsys):
    pytest.importorskip("torch")  # writes the plugins' files
    source = golden / name / "checkpoint"
    assert command("to-jax", source, tmp_path / "jax", "--quiet", "--shard-gb", "0.0005") == 0
    assert "rotary_emb.inv_freq (8,)" in capsys.readouterr().out
    assert command("to-torch", tmp_path / "jax", tmp_path / "torch", "--quiet", "--shard-gb", "0.0003") == 0
    assert len(list((tmp_path / "torch").glob("model-*.safetensors"))) > 1
    theirs = {k: v for k, v in tensors_of(source).items() if "inv_freq" not in k}
    assert_same_bits(tensors_of(tmp_path / "torch"), theirs)
    assert (tmp_path / "torch/tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    raw, old = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "torch", source))
    assert raw["special_tokens2ids_dict"] == old["special_tokens2ids_dict"]
    for plugin, options in old["plugins_init_kwargs"].items():
        new = raw["plugins_init_kwargs"][plugin]
        assert {k: new[k] for k in options if k in new and not k.startswith("pretrained")} == {
            k: v for k, v in options.items() if k in new and not k.startswith("pretrained")
        }
    # the export can be converted again, to the same model
    again = open_checkpoint(tmp_path / "torch")
    assert again.model == open_checkpoint(source).model and again.loss == open_checkpoint(source).loss
    convert_to_jax(again, tmp_path / "again")
    first, second = open_params(tmp_path / "jax"), open_params(tmp_path / "again")
    assert_same_bits({k: v.read() for k, v in second.items()}, {k: v.read() for k, v in first.items()})


@pytest.fixture
def sdxl(tmp_path):
    """Saves a small DreamLLM with SDXL's decoder and random weights."""
    small = tiny.config(unet=tiny.MODEL["unet"] | tiny.SDXL_CONDITIONS, image_size=16)
    model = dataclasses.replace(small, vae=dataclasses.replace(small.vae, sample_size=16))
    tokenizer = train_tokenizer(["one two three"], 400)
    save_pretrained(tmp_path / "jax", tiny.random_params(model), model, tokenizer, GenerationConfig())
    return tmp_path / "jax", model


def test_sdxl_there_and_back(sdxl, tmp_path):
    """SDXL is exported in the files of the reference's variant for it, including the pooled condition."""
    pytest.importorskip("torch")  # writes the plugins' files
    folder, model = sdxl
    convert_to_torch(folder, tmp_path / "torch")
    head = read_pickle(tmp_path / "torch" / "stable_diffusion_xl_head.bin")[0]
    assert any(name.startswith("global_projector.") for name in head)
    assert not (tmp_path / "torch" / "stable_diffusion_head.bin").exists()
    plugins = json.loads((tmp_path / "torch" / "config.json").read_text())["plugins_init_kwargs"]
    assert "stable_diffusion_xl_head" in plugins
    again = open_checkpoint(tmp_path / "torch")
    assert again.model == model
    params, report = again.params()
    assert not report.faulty
    first = {path: t.read() for path, t in open_params(folder).items()}
    assert_same_bits({path: t.read() for path, t in params.items()}, first)


@pytest.mark.parametrize("direction", ["to-jax", "to-torch"])
def test_a_full_disk_is_named_before_anything_is_written(direction, golden, tmp_path, monkeypatch, capsys):
    source = golden / "dreamllm-a/checkpoint"
    if direction == "to-torch":
        pytest.importorskip("torch")  # writes the plugins' files
        convert_to_jax(open_checkpoint(source), tmp_path / "jax")
        source = tmp_path / "jax"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    assert command(direction, source, tmp_path / "out", "--quiet") == 2
    assert re.search(
        r"needs 0.0 GiB of disk space, and 0.0 GiB are free; free some space, or choose another folder",
        capsys.readouterr().err,
    )
    assert not [path for path in tmp_path.iterdir() if path.name != "jax"]


def test_dtype_halves_the_files(tmp_path, golden):
    pytest.importorskip("torch")  # writes the plugins' files
    source = open_checkpoint(golden / "dreamllm-a/checkpoint")
    convert_to_jax(source, tmp_path / "half", dtype="bfloat16")
    leaves = unflatten_dict(
        {path: tensor.read() for path, tensor in open_params(tmp_path / "half").items()}, sep="/"
    )
    assert str(leaves["llama"]["norm"]["scale"].dtype) == "bfloat16"
    convert_to_torch(tmp_path / "half", tmp_path / "torch")
    kinds = {str(a.dtype) for a in tensors_of(tmp_path / "torch").values()}
    assert kinds == {"bfloat16"}
    assert json.loads((tmp_path / "torch/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "bfloat16" in describe(tmp_path / "half") and "DreamLLM" in describe(tmp_path / "torch")


def test_a_config_that_contradicts_its_tokenizer(tmp_path, golden, capsys):
    """config.json has wrong ids, as in published checkpoints. The tokenizer's are used and reported."""
    pytest.importorskip("torch")  # writes the plugins' files
    source = tmp_path / "a" / "checkpoint"
    shutil.copytree(golden / "dreamllm-a", tmp_path / "a")
    raw = json.loads((source / "config.json").read_text())
    raw |= {"bos_token_id": 0, "pad_token_id": -1}
    raw["special_tokens2ids_dict"]["additional_special_tokens"]["<dream>"] = 513
    (source / "config.json").write_text(json.dumps(raw))
    assert command("to-jax", source, tmp_path / "jax", "--quiet") == 0
    out = capsys.readouterr().out
    for name, stated, right in (("<s>", 0, 1), ("[PAD]", -1, 512), ("<dream>", 513, 519)):
        assert f"config.json says that {name} is {stated}; the tokenizer says {right}, which is used" in out
    assert "differing (3)" in out and "differing (3)" in describe(source)
    with pytest.warns(UserWarning, match="config.json says that <s> is 0; the tokenizer says 1"):
        special = open_model(source).tokenizer.special
    assert (special.bos, special.pad, special.dream) == (1, 512, 519)
    assert command("to-torch", tmp_path / "jax", tmp_path / "torch", "--quiet") == 0
    ids = json.loads((tmp_path / "torch" / "config.json").read_text())["special_tokens2ids_dict"]
    assert (
        ids
        == json.loads((golden / "dreamllm-a/checkpoint/config.json").read_text())["special_tokens2ids_dict"]
    )


def test_bad_sources_are_one_sentence_and_leave_nothing(tmp_path, golden, capsys):
    source = tmp_path / "source"
    shutil.copytree(golden / "dreamllm-a/checkpoint", source)
    shutil.copytree(golden / "dreamllm-a/parts", tmp_path / "parts")
    data = (source / "stable_diffusion_head.bin").read_bytes()
    (source / "stable_diffusion_head.bin").write_bytes(data[: len(data) // 2])
    target = tmp_path / "target"
    assert command("to-jax", source, target, "--quiet") == 2
    assert "stable_diffusion_head.bin" in capsys.readouterr().err
    broken = bytearray(data)
    broken[len(data) // 2] ^= 1
    (source / "stable_diffusion_head.bin").write_bytes(broken)
    assert command("to-jax", source, target, "--quiet") == 2
    assert "stable_diffusion_head.bin is damaged" in capsys.readouterr().err
    (source / "dream_embedding.bin").unlink()
    assert command("to-jax", source, target, "--quiet") == 2
    assert "dream_queries/dream_queries (8, 64)" in capsys.readouterr().err
    for wrong, words in [
        (tmp_path / "nowhere", "does not exist"),
        (golden, "neither config.json nor unet/config.json"),
        (source / "config.json", "is a file"),
    ]:
        assert command("inspect", wrong) == 2
        assert words in capsys.readouterr().err
    assert command("to-torch", source, target, "--quiet") == 2
    assert "is not a converted model" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts", "source"]


@pytest.mark.parametrize("direction", ["to-jax", "to-torch"])
def test_a_killed_conversion_leaves_no_model(tmp_path, golden, direction):
    """A conversion that is killed while it writes leaves nothing under the target's name."""
    source = golden / "dreamllm-a/checkpoint"
    if direction == "to-torch":
        pytest.importorskip("torch")  # writes the plugins' files
        convert_to_jax(open_checkpoint(source), tmp_path / "jax")
        source = tmp_path / "jax"
    slow = (
        "import runpy, sys, time; from dreamllm_jax.checkpoint import tensors; read = tensors.contiguous\n"
        "tensors.contiguous = lambda array: (time.sleep(0.2), read(array))[1]\n"
        f"sys.argv = [{str(TOOL)!r}, {direction!r}, {str(source)!r}, {str(tmp_path / 'out')!r}, '--quiet']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", slow])
    try:
        while not any(path.stat().st_size > 1000 for path in tmp_path.glob(".out.partial-*/*")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.partial-*")
    with pytest.raises(ValueError):  # and its leftovers are not accepted as a model
        open_model(left)
    assert command(direction, source, tmp_path / "out", "--quiet") == 0


@pytest.mark.parity
def test_legacy_folders_hold_only_the_connectors(tmp_path, golden):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    shutil.copytree(golden / "dreamllm-a/checkpoint", source)
    convert_to_jax(open_checkpoint(golden / "dreamllm-a/checkpoint"), tmp_path / "jax")
    convert_to_torch(tmp_path / "jax", tmp_path / "parts-of")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("clip", "sd"):
        shutil.copytree(tmp_path / "parts-of" / name, parts / name)
    load = lambda name: torch.load(source / name, weights_only=True)  # noqa: E731
    vision, head = load("clip_vision_embedding.bin"), load("stable_diffusion_head.bin")
    torch.save(torch.nn.Parameter(load("dream_embedding.bin")["dream_queries"]), source / "dream_queries.pt")
    torch.save(
        {k: vision[f"projector.{k}"] for k in ("projector.weight", "projector.bias")},
        source / "clip_vision_model_projector.pt",
    )
    torch.save({"weight": head["projector.projector.weight"]}, source / "unet_projector.pt")
    for name in ("clip_vision_embedding.bin", "stable_diffusion_head.bin", "dream_embedding.bin"):
        (source / name).unlink()
    legacy, report = open_checkpoint(source, parts).params()
    assert not report.faulty
    first = open_params(tmp_path / "jax")
    assert_same_bits({k: v.read() for k, v in legacy.items()}, {k: v.read() for k, v in first.items()})


@pytest.mark.parity
def test_transformers_and_diffusers_load_the_exported_folders(tmp_path, golden):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    source = golden / "dreamllm-b/checkpoint"
    convert_to_jax(open_checkpoint(source), tmp_path / "jax")
    out = tmp_path / "torch"
    convert_to_torch(tmp_path / "jax", out)
    theirs = {k: v for k, v in tensors_of(source).items() if "inv_freq" not in k}

    def check(state, role, prefix="", theirs_prefix=""):
        for name, value in state.items():
            if "position_ids" not in name:
                expected = theirs[f"{role}: {prefix}{name}"]
                np.testing.assert_array_equal(value.numpy(), expected, name)

    llama, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check(llama.state_dict(), "llm")
    clip, info = transformers.CLIPVisionModel.from_pretrained(out / "clip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(clip.state_dict()) >= 55
    unet = diffusers.UNet2DConditionModel.from_pretrained(out / "sd", subfolder="unet")
    check(unet.state_dict(), "stable_diffusion_head", "unet.")
    vae = diffusers.AutoencoderKL.from_pretrained(out / "sd", subfolder="vae")
    check(vae.state_dict(), "stable_diffusion_head", "vae.")
    schedule = diffusers.DDPMScheduler.from_pretrained(out / "sd", subfolder="scheduler")
    assert schedule.config.prediction_type == "v_prediction"
    for name in ("clip_vision_embedding", "dream_embedding", "stable_diffusion_head"):
        check(torch.load(out / f"{name}.bin", weights_only=True), name)


@pytest.mark.parity
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_transformers_and_diffusers_are_recognized(tmp_path, golden, sharded):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    limit = {"max_shard_size": "100KB"} if sharded else {}
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    llama = transformers.LlamaConfig(vocab_size=100, **tiny, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**tiny, image_size=28, patch_size=7, projection_dim=16)
    text = transformers.CLIPTextConfig(**tiny, vocab_size=100, projection_dim=16)
    both = transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=16
    )
    llava = transformers.LlavaConfig(vision_config=vision, text_config=llama, image_token_index=99)
    for kind, model in {
        "LLaMA": transformers.LlamaForCausalLM(llama),
        "CLIP vision": transformers.CLIPVisionModel(vision),
        "CLIP text": transformers.CLIPTextModel(text),
        "CLIP": transformers.CLIPModel(both),
        "LLaVA": transformers.LlavaForConditionalGeneration(llava),
    }.items():
        folder = tmp_path / kind
        model.save_pretrained(folder, **limit)
        source = open_checkpoint(folder)
        assert kind.split()[0] in source.kind
        params, report = source.params()
        assert not report.faulty, f"{kind}: {report}"
        count = sum(p.numel() for p in model.parameters())
        assert sum(int(np.prod(t.shape)) for t in params.values()) == count, kind


@pytest.mark.parity
def test_a_diffusers_pipeline_is_recognized(tmp_path, golden):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    parts = golden / "dreamllm-a/parts/sd"
    unet = diffusers.UNet2DConditionModel.from_config(parts / "unet")
    vae = diffusers.AutoencoderKL.from_config(parts / "vae")
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    shutil.copytree(parts / "scheduler", tmp_path / "scheduler")
    params, report = open_checkpoint(tmp_path).params()
    assert not report.faulty
    assert {path.split("/")[0] for path in params} == {"unet", "vae"}


def test_plugins_inside_the_language_models_file(golden, tmp_path):
    """A complete checkpoint has each plugin under the model's name for it."""
    shutil.copytree(golden / "dreamllm-b", tmp_path / "b")
    source = tmp_path / "b" / "checkpoint"
    before = {path: t.read() for path, t in open_checkpoint(source).params()[0].items()}
    (whole,) = source.glob("model*.safetensors")
    tensors = {name: t.read() for name, t in read_safetensors(whole).items()}
    for stem, prefix in (
        ("clip_vision_embedding", "model.clip_vision_embedding."),
        ("dream_embedding", "model.dream_embedding."),
        ("stable_diffusion_head", "stable_diffusion_head."),
    ):
        found = read_pickle(source / f"{stem}.bin")[0]
        tensors |= {f"{prefix}{name}": t.read() for name, t in found.items()}
        (source / f"{stem}.bin").unlink()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, whole)
    params, report = open_checkpoint(source).params()
    assert not report.faulty
    assert_same_bits({path: t.read() for path, t in params.items()}, before)
