"""Every number of the reference's, within its bound; and a wrong model, which is found out."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dreamllm_jax.convert.verify.__main__ import BOUNDS, main, missed, verify
from dreamllm_jax.convert.verify.case import open_case
from dreamllm_jax.convert.verify.generation import compare_greedy, compare_picture
from dreamllm_jax.convert.verify.sequences import compare_sequences

OUTPUTS = ("image_features", "last_hidden_state", "logits", "unet_ctx", "unet_out", "vae_mean", "vae_logvar")
PICTURE = ("states", "conditions", "timesteps", "final_latents", "image")


@functools.cache
def errors_of(folder):
    return verify(folder)


@pytest.fixture(scope="module", params=["dreamllm-a", "dreamllm-b"])
def folder(request, golden):
    return golden / request.param


def test_losses(folder):
    for name in ("loss", "loss.lm", "loss.vm"):
        assert errors_of(folder)[name] <= 1e-5, name


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(folder, name):
    assert errors_of(folder)[f"out.{name}"] <= 1e-4


def test_every_gradient(folder):
    case = open_case(folder)
    grads = {name: e for name, e in errors_of(folder).items() if name.startswith("grad.")}
    trained = ("llama/", "vision_projector/", "dream_queries/", "condition_projector/")
    assert {name.removeprefix("grad.") for name in grads} == {p for p in case.params if p.startswith(trained)}
    assert max(grads.values()) <= 1e-4


def test_generation(folder):
    errors = errors_of(folder)
    assert errors["gen.greedy_ids"] == 0
    assert len(open_case(folder).reference["gen.greedy_ids"][0]) == 42  # 12 after a prompt of 30
    for name in PICTURE:
        assert errors[f"t2i.{name}"] <= 1e-3, name


def test_nothing_is_missed_and_nothing_left_out(folder):
    errors = errors_of(folder)
    assert not missed(errors)
    quantities = {name for name in errors if not name.startswith("grad.")}
    assert quantities == {"loss", "loss.lm", "loss.vm", "gen.greedy_ids"} | {
        *(f"out.{name}" for name in OUTPUTS),
        *(f"t2i.{name}" for name in PICTURE),
    }
    assert {name.split(".")[0] for name in errors} <= BOUNDS.keys()


def test_sequences_for_both_settings(golden):
    errors = compare_sequences(golden / "sequences.json", golden / "dreamllm-a" / "checkpoint")
    assert len(errors) == 8 and set(errors.values()) == {0.0}


def test_a_wrong_weight_is_found_out(golden):
    """One matrix of the language model, and one of the U-Net, a little off."""
    case = open_case(golden / "dreamllm-a")
    for path in ("llama/layers/mlp/down_proj/kernel", "unet/mid_block/resnets_0/conv1/kernel"):
        case.params[path] = case.params[path] * np.float32(1.05)
    errors = compare_picture(case)
    assert {"t2i.states", "t2i.final_latents", "t2i.image"} <= missed(errors).keys()
    case.params["llama/norm/scale"] = case.params["llama/norm/scale"] * np.float32("nan")
    assert "t2i.states" in missed(compare_picture(dataclasses.replace(case)))
    case = open_case(golden / "dreamllm-a")
    case.params["llama/lm_head/kernel"] = -case.params["llama/lm_head/kernel"]
    assert missed(compare_greedy(dataclasses.replace(case)))
    assert missed({"loss": float("nan"), "sequences, ids": 1.0}).keys() == {"loss", "sequences, ids"}
    assert missed({"out.x": 2e-4}) and not missed({"out.x": 9e-5})


def test_a_wrong_row_is_found_out(golden, tmp_path):
    content = json.loads((golden / "sequences.json").read_text())
    content["tokenizer"][0]["ids"][1] += 1
    content["sequences"][0]["input_ids"][-2] += 1
    content["sequences"][1]["num_dream_images"] = 0
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    errors = compare_sequences(tmp_path / "wrong.json", golden / "dreamllm-a" / "checkpoint")
    assert {name for name, e in errors.items() if e} == {
        "tokenizer (legacy)",
        "sequences, ids (legacy)",
        "sequences, pictures (legacy)",
    }


def test_the_command(golden, tmp_path, capsys):
    tokenizer = f"--tokenizer={golden / 'dreamllm-a' / 'checkpoint'}"
    assert main([str(golden / "sequences.json"), tokenizer]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {0.0}
    content = json.loads((golden / "sequences.json").read_text())
    content["tokenizer"][0]["ids"] = [1]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "wrong.json"), tokenizer]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["tokenizer (legacy)"] == 1 and "tokenizer (legacy) is off by 1" in said.err
    for arguments, words in (
        ([str(golden / "sequences.json")], "name the tokenizer's folder: --tokenizer"),
        ([str(tmp_path)], "has no checkpoint; give a folder laid out as tests/golden/dreamllm-a"),
        ([str(tmp_path / "none.json"), tokenizer], "is no file of sequences"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err


def test_a_whole_folder_from_the_command_line(golden, tmp_path):
    """As a user starts it, on a folder whose reference disagrees in one array."""
    shutil.copytree(golden / "dreamllm-b", tmp_path / "case")
    command = [sys.executable, "-m", "dreamllm_jax.convert.verify", str(tmp_path / "case")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == errors_of(golden / "dreamllm-b").keys()
