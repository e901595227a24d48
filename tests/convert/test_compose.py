"""Towers from several checkpoints composed into one model, the start of stage I."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dreamllm_jax import DreamLLM
from dreamllm_jax.checkpoint.parameter_files import open_params, save_params
from dreamllm_jax.checkpoint.tensors import ArrayTensor
from dreamllm_jax.checkpoint.vocabulary import Extended, check_tokenizer_fits
from dreamllm_jax.convert.compose import compose
from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.data.tokenizer import ADDED_TOKENS, Tokenizer, train_tokenizer
from tests.folders import load_pretrained, take_towers

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
ROWS = 512  # of the golden vocabulary, without the control tokens


def command(*arguments) -> int:
    spec = importlib.util.spec_from_file_location("convert_weights", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def sources(golden, tmp_path_factory):
    """Writes published formats: a Vicuna without control tokens, a CLIP tower and a Stable Diffusion."""
    home = tmp_path_factory.mktemp("sources")
    convert_to_jax(open_checkpoint(golden / "dreamllm-a" / "checkpoint"), home / "jax")
    for name, towers in (("llama", ("llama",)), ("clip", ("vision",)), ("sd", ("unet", "vae"))):
        take_towers(home / "jax", home / f"{name}-jax", *towers)
    params = {path: t.read() for path, t in open_params(home / "llama-jax").items()}
    params["llama/embed_tokens/embedding"] = params["llama/embed_tokens/embedding"][:ROWS]
    params["llama/lm_head/kernel"] = params["llama/lm_head/kernel"][:, :ROWS]
    content = json.loads((home / "llama-jax" / "config.json").read_text())
    content["model"]["llama"]["vocab_size"] = ROWS
    save_params(home / "llama-jax", params)
    (home / "llama-jax" / "config.json").write_text(json.dumps(content))
    for name in ("llama", "clip", "sd"):
        convert_to_torch(home / f"{name}-jax", home / name)
    shutil.copy(golden / "dreamllm-a" / "checkpoint" / "tokenizer.model", home / "llama" / "tokenizer.model")
    return {
        "llm": home / "llama",
        "vision": home / "clip",
        "diffusion": home / "sd",
        "all": golden / "dreamllm-a" / "checkpoint",
    }


@pytest.fixture(scope="module")
def start(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed") / "start"
    towers = [f"--{name}={sources[name]}" for name in ("llm", "vision", "diffusion")]
    assert command("to-jax", folder, *towers, "--quiet") == 0
    return folder


def test_new_and_unused_parameters_are_reported(sources, tmp_path, capsys):
    towers = (f"--llm={sources['llm']}", f"--vision={sources['vision']}", f"--diffusion={sources['all']}")
    assert command("to-jax", tmp_path / "start", *towers, "--quiet") == 0
    out = capsys.readouterr().out
    assert "made (5):" in out and "dream_queries/dream_queries (64, 64), initialized" in out
    assert "rows 512 to 519 of the vocabulary, for control tokens: the mean of the others" in out
    assert f"{sources['all']}: llama, " in out  # only the decoder of that source was requested


def test_faults_of_every_source_are_named(sources):
    llm, vision = open_checkpoint(sources["llm"]), open_checkpoint(sources["vision"])
    llm.report.unexpected.append("a stranger")
    vision.report.ignored.append("a buffer")
    report = compose(llm, vision=vision).params()[1]
    assert report.unexpected == ["a stranger"] and "a buffer" in report.ignored and report.faulty


def test_the_start_of_stage_one(sources, start):
    loaded = load_pretrained(start)
    whole = {path: t.read() for path, t in open_checkpoint(sources["all"]).params()[0].items()}
    assert loaded.params.keys() == whole.keys()
    for path, theirs in whole.items():
        ours, tower = loaded.params[path], path.split("/")[0]
        wanted = (64, theirs.shape[1]) if tower == "dream_queries" else theirs.shape  # 64: the paper's
        assert ours.shape == wanted
        if tower in ("vision", "unet", "vae"):
            np.testing.assert_array_equal(ours, theirs, err_msg=path)
        elif tower != "llama":  # the connectors are initialized, and not with zeros
            assert not np.array_equal(ours, theirs) and (ours.std() > 0 or path.endswith("bias"))
    rows, first = loaded.params["llama/embed_tokens/embedding"], whole["llama/embed_tokens/embedding"][:ROWS]
    np.testing.assert_array_equal(rows[:ROWS], first)
    np.testing.assert_allclose(rows[ROWS:], np.tile(first.mean(0), (8, 1)), atol=1e-6)
    head = loaded.params["llama/lm_head/kernel"]
    np.testing.assert_allclose(
        head[:, ROWS:], head[:, :ROWS].mean(1, keepdims=True) + np.zeros((1, 8)), atol=1e-6
    )
    assert (start / "tokenizer.model").read_bytes() == (sources["llm"] / "tokenizer.model").read_bytes()
    special = loaded.tokenizer.special
    assert special.pad == ROWS and loaded.config.llama.vocab_size == ROWS + len(ADDED_TOKENS)
    assert (special.im_start, special.dream_end, special.dream_start) == (ROWS + 1, ROWS + 2, ROWS + 3)


def test_it_generates(start):
    model = DreamLLM.from_pretrained(start)
    (picture,) = model.generate_images("hello", num_inference_steps=1, guidance_scale=1.0)
    assert picture.size == (model.config.image_size,) * 2


def test_a_bare_vicuna_loads_and_writes(sources):
    """The rows are those of the complete checkpoint, so the text is the same except for control tokens."""
    bare, whole = (DreamLLM.from_pretrained(sources[name]) for name in ("llm", "all"))
    assert bare.config.vision is None and bare.generation.template is None
    assert bare.tokenizer.special == whole.tokenizer.special
    for prompt in ("hello world", "a digit"):
        expected = whole.tokenizer.encode(prompt)
        assert bare.tokenizer.encode(prompt) == expected
        assert isinstance(bare.generate_text(prompt, max_new_tokens=4), str)


def test_a_tower_is_exchanged_with_its_connector(sources, tmp_path):
    """Replaces a DreamLLM's image decoder: dream queries and condition are new, the vision tower stays."""
    source = compose(open_checkpoint(sources["all"]), diffusion=open_checkpoint(sources["diffusion"]))
    assert source.fresh == ("dream_queries", "condition_projector", "global_projector")
    convert_to_jax(source, tmp_path / "exchanged")
    ours, whole = load_pretrained(tmp_path / "exchanged").params, open_checkpoint(sources["all"]).params()[0]
    for path, tensor in whole.items():
        kept = path.split("/")[0] not in source.fresh
        assert np.array_equal(ours[path], tensor.read()) == kept, path


def test_what_does_not_go_together(sources, tmp_path, capsys):
    for arguments, words in (
        ((tmp_path / "x",), "give either SRC or the towers"),
        ((sources["all"], tmp_path / "x", f"--llm={sources['llm']}"), "give either SRC or the towers"),
        ((tmp_path / "x", f"--vision={sources['vision']}"), "name it with --llm"),
        ((tmp_path / "x", f"--llm={sources['vision']}"), "has no llama; give a checkpoint that has one"),
        ((tmp_path / "x", f"--llm={sources['llm']}", f"--vision={sources['diffusion']}"), "has no vision"),
    ):
        assert command("to-jax", *arguments, "--quiet") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("axis", [0, 1])
def test_extended_tensors_read_in_parts(axis):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    extended = Extended(ArrayTensor("x", values), 6, axis)
    whole = extended.read()
    assert whole.shape == extended.shape == ((6, 4) if axis == 0 else (3, 6))
    np.testing.assert_array_equal(whole[:3, :4], values)
    np.testing.assert_array_equal(np.take(whole, 5, axis), values.mean(axis))
    np.testing.assert_array_equal(extended.read(1, 3), whole[1:3])


def test_a_tokenizer_of_another_model(sources, tmp_path, capsys):
    """More tokens than rows, or far fewer, are an error on loading and converting; nothing is written."""
    folder = tmp_path / "mixed"
    shutil.copytree(sources["llm"], folder)
    (folder / "tokenizer.model").unlink()
    pieces = [f"{a}{b}" for a in "bcdfghjklmnpqrstvwxyz" for b in "aeiou"]
    train_tokenizer([" ".join(f"{x}{y}" for x in pieces for y in pieces)], 600).save(folder)
    assert command("to-jax", folder, tmp_path / "out", "--quiet") == 2
    words = f"{folder}: its tokenizer has 600 tokens, and its weights embed 512; they do not belong together"
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="its tokenizer has 600 tokens, and its weights embed 512"):
        DreamLLM.from_pretrained(folder)
    roomy = open_checkpoint(sources["llm"]).model
    roomy = dataclasses.replace(roomy, llama=dataclasses.replace(roomy.llama, vocab_size=32000))
    with pytest.raises(ValueError, match="has 512 tokens, and its weights embed 32000"):
        check_tokenizer_fits(Tokenizer.load(sources["llm"], extend=True), roomy, sources["llm"])


def test_a_chat_model_answers_in_its_own_template(sources, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(sources["llm"], folder)
    program = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}assistant"
    )
    (folder / "chat_template.jinja").write_text(program)
    model = DreamLLM.from_pretrained(folder)
    assert model.generation.template == "tokenizer"
    model.save_pretrained(tmp_path / "saved")
    plain = DreamLLM.from_pretrained(sources["llm"])
    for chat in (model, DreamLLM.from_pretrained(tmp_path / "saved")):
        text = chat.generate_text("hello", max_new_tokens=6)
        assert text == plain.generate_text("user hello assistant", max_new_tokens=6)


def test_an_unusable_chat_template_is_reported(sources, tmp_path):
    """The template leaves out the prompt, so prompts are used without it, and the conversion reports why."""
    folder = tmp_path / "chat"
    shutil.copytree(sources["llm"], folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<im_start>' + m['role'] }}{% endfor %}"
    )
    source = open_checkpoint(folder)
    assert source.template is None
    (line,) = (line for line in source.params()[1].differing if "chat template" in line)
    assert f"The chat template of the tokenizer in {folder} cannot be used: it leaves out what is" in line
