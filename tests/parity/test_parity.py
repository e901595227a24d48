"""All numbers of the reference are within their bounds, and a wrong model is detected."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dreamllm_jax.commands.main import main
from dreamllm_jax.parity.case import open_case
from dreamllm_jax.parity.errors import exceeding
from dreamllm_jax.parity.folder import BOUNDS, compare_folder
from dreamllm_jax.parity.generation import compare_greedy, compare_image
from dreamllm_jax.parity.sequences import compare_sequences
from dreamllm_jax.parity.step import compare_step

pytestmark = pytest.mark.usefixtures("optimized")


def missed(errors):
    return exceeding(errors, BOUNDS)


OUTPUTS = ("image_features", "last_hidden_state", "logits", "unet_ctx", "unet_out", "vae_mean", "vae_logvar")
PICTURE = ("states", "conditions", "timesteps", "final_latents", "image")


@functools.cache
def errors_of(folder):
    return compare_folder(folder)


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
    """Changes one matrix of the language model and one of the U-Net slightly."""
    case = open_case(golden / "dreamllm-a")
    for path in ("llama/layers/mlp/down_proj/kernel", "unet/mid_block/resnets_0/conv1/kernel"):
        case.params[path] = case.params[path] * np.float32(1.05)
    errors = compare_image(case)
    assert {"t2i.states", "t2i.final_latents", "t2i.image"} <= missed(errors).keys()
    case.params["llama/norm/scale"] = case.params["llama/norm/scale"] * np.float32("nan")
    assert "t2i.states" in missed(compare_image(dataclasses.replace(case)))
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
        "sequences, images (legacy)",
    }


def test_the_command(golden, tmp_path, capsys):
    tokenizer = f"--tokenizer={golden / 'dreamllm-a' / 'checkpoint'}"
    assert main(["parity", str(golden / "sequences.json"), tokenizer]) == 0
    assert set(json.loads(capsys.readouterr().out).values()) == {0.0}
    content = json.loads((golden / "sequences.json").read_text())
    content["tokenizer"][0]["ids"] = [1]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    assert main(["parity", str(tmp_path / "wrong.json"), tokenizer]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["tokenizer (legacy)"] == 1
    assert "tokenizer (legacy): error 1 exceeds its bound" in output.err
    for arguments, words in (
        ([str(golden / "sequences.json")], "name the folder of their tokenizer: --tokenizer"),
        ([str(tmp_path)], "has no checkpoint; give a folder laid out as tests/golden/dreamllm-a"),
        ([str(tmp_path / "none.json"), tokenizer], "is not a file of sequences"),
    ):
        assert main(["parity", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.fixture
def copied(golden, tmp_path):
    """Returns a copy of the folder, whose reference a test can change."""
    shutil.copytree(golden / "dreamllm-b", tmp_path / "case")
    file = tmp_path / "case" / "reference.safetensors"

    def change(edit):
        reference = load_file(file)
        edit(reference)
        save_file(reference, file)
        return tmp_path / "case"

    return change


def command(folder):
    arguments = [sys.executable, "-m", "dreamllm_jax.parity", str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_a_folder_that_disagrees_from_the_command_line(copied):
    """Runs the command: it prints every number and names the one that exceeds its bound."""

    def edit(reference):
        reference["out.unet_out"] = reference["out.unet_out"] + np.float32(1e-3)
        for name in [n for n in reference if n.startswith("t2i.")]:  # a reference without an image
            del reference[name]

    done = command(copied(edit))
    assert done.returncode == 1 and "out.unet_out: error 0.001" in done.stderr
    errors = json.loads(done.stdout)
    assert 9e-4 < errors["out.unet_out"] < 1.1e-3 and errors["out.logits"] < 1e-4
    assert missed(errors).keys() == {"out.unet_out"} and not [n for n in errors if n.startswith("t2i.")]


def test_a_reference_without_some_gradients(copied, golden):
    """For a stage that trained only the connectors: compares their gradients and warns of missing ones."""

    def edit(reference):
        gone = [n for n in reference if n.startswith("grad.model.layers.") or n == "grad.lm_head.weight"]
        for name in [*gone, "out.logits"]:
            del reference[name]

    with pytest.warns(UserWarning, match="no gradient of llama/layers/.*; not compared"):
        errors = compare_step(open_case(copied(edit)))
    whole = {n for n in errors_of(golden / "dreamllm-b") if not n.startswith(("t2i.", "gen."))}
    kept = {n for n in whole if not n.startswith(("grad.llama/layers", "grad.llama/lm_head"))}
    assert errors.keys() == kept - {"out.logits"} and not missed(errors)

    def tear(reference):
        del reference["grad.model.embed_tokens.weight"]
        reference["grad.model.layers.0.mlp.up_proj.weight"] = np.ones((256, 96), np.float32)

    with pytest.raises(ValueError, match="llama/layers/mlp/up_proj/kernel, layer 1"):
        compare_step(open_case(copied(tear)))


# One rounding to bfloat16 has an error of up to 2^-9. A value is rounded about a hundred times here, and the
# errors add up like a random walk, to 10 * 2^-9. The largest error among thousands of values is three times
# that. A gradient passes through the network twice. A loss is a mean, in which most of the error cancels.
BFLOAT16 = {"loss": 2**-8, "out": 2**-4, "grad": 0.05}


def test_in_bfloat16(folder):
    """The step in bfloat16 is close to the reference's float32 numbers, but not equal to float32."""
    case = open_case(folder)
    errors = compare_step(
        dataclasses.replace(case, config=dataclasses.replace(case.config, dtype="bfloat16"))
    )
    assert errors.keys() == {n for n in errors_of(folder) if not n.startswith(("t2i.", "gen."))}
    assert {n: e for n, e in errors.items() if not e <= BFLOAT16[n.split(".")[0]]} == {}
    assert min(e for n, e in errors.items() if n.startswith("grad.")) > 1e-4
