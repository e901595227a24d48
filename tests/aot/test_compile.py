"""Small programs compiled by the real TPU compiler, without a TPU: traffic, memory and FLOPs."""

import dataclasses
import json

import jax
import pytest
from PIL import Image

from dreamllm_jax.aot import compilation
from dreamllm_jax.aot.compilation import compile_and_report
from dreamllm_jax.aot.memory import bytes_held, too_large
from dreamllm_jax.aot.program import generation_program, train_program
from dreamllm_jax.aot.report import by_kind, to_json
from dreamllm_jax.aot.topology import topology_devices
from dreamllm_jax.commands.main import main
from dreamllm_jax.config import chips
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.train import MeshConfig, Recipe
from tests.train import tiny

# Cached programs cannot be loaded without their devices, so they are compiled again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

TOPOLOGY = "v5e:2x2"
ROWS, LENGTH = 8, 104  # no dimension of a parameter is a multiple of this length

# A recipe file for the command line: it trains a vision projector, and the language model is frozen.
FILE = """
from tests.train.tiny import MODEL

def get_config(arg=None):
    model = {k: v for k, v in MODEL.items() if k not in ("unet", "vae", "schedule")} | {"dtype": "bfloat16"}
    data = dict(batch_size=8, length=64, max_images=2)
    stage = dict(name="seeing", trainable=("vision_projector",), steps=1, data=data)
    return dict(name="small", model=model, stages=[stage])
"""


@pytest.fixture(scope="module")
def devices():
    pytest.importorskip(
        "libtpu", reason="libtpu, the TPU's compiler, is not installed (pip install 'dreamllm-jax[aot]')"
    )
    return topology_devices(TOPOLOGY)


def recipe(mesh, towers=("llama", "vision"), **stage):
    """Returns a joint stage of the tiny model; without a U-Net it has no dreams."""
    config = tiny.config(dtype="bfloat16")
    absent = {name: None for name in ("vision", "unet", "vae") if name not in towers}
    data = DataConfig(batch_size=ROWS, length=LENGTH, max_images=2, max_dreams=2)
    stage = dataclasses.replace(tiny.stage(loss=dict(condition_dropout=0.0), **stage), data=data)
    return Recipe("tiny", dataclasses.replace(config, **absent), (stage,), mesh=mesh)


def compiled_step(recipe, devices, effort="low"):
    program = train_program(recipe, recipe.stages[0], devices)
    return compile_and_report(recipe, program, TOPOLOGY, effort)


def run(*arguments) -> int:
    """Runs `dreamllm compile` and returns its exit code."""
    return main(["compile", *arguments])


def use_chip(monkeypatch, chip):
    """Makes every described device this chip."""
    for module in (chips, compilation):
        monkeypatch.setattr(module, "chip_of", lambda kind: chip)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(FILE)
    return f"--config={path}"


def test_the_command_and_a_frozen_language_model(devices, file, tmp_path, capsys):
    """Frozen weights have no optimizer state, and their gradients are neither computed nor sent."""
    assert run(file, f"--topology={TOPOLOGY}", f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "compile.json").read_text())
    memory = found["memory"]["bytes"]
    assert found["memory"]["fits"] and "small, seeing on v5e:2x2" in capsys.readouterr().out
    assert Image.open(tmp_path / "compile.png").width > 500

    assert 0 < memory["optimizer"] <= 2.5 * memory["parameters"] < 0.2 * memory["frozen"]
    assert memory["activations"] > 0 and memory["temporaries"] > 0
    # The model FLOPs are those of two passes: forward, and the gradients of the activations. The gradients
    # of the weights would be a third.
    ratio = found["compiled_flops"]["llama"] / found["model_flops"]["llama"]
    assert 0.7 < ratio < 1.2
    moved = {c["kind"]: c["bytes"] for c in found["collectives"]}
    assert set(moved) == {"all-gather", "all-reduce"} and all(
        c["axes"] == ["fsdp"] for c in found["collectives"]
    )
    # Float32 gradients of the trained parameters, and the loss.
    assert moved["all-reduce"] < 8 * memory["parameters"]


def test_the_command_says_what_is_impossible(devices, file, capsys):
    def message(*arguments):
        assert run(file, *arguments) == 2
        return capsys.readouterr().err

    assert "--topology=v9:2x2 is unknown" in message("--topology=v9:2x2")
    assert "does not know this slice" in message("--topology=v5p:3x3x3")
    assert "data.batch_size=6 is not divisible by the 4 devices" in message(
        f"--topology={TOPOLOGY}", "--config.stages.seeing.data.batch_size=6"
    )
    assert "mesh" in message(f"--topology={TOPOLOGY}", "--config.mesh.fsdp=3")
    assert "no tower" in message(f"--topology={TOPOLOGY}", "--program=denoise")


def test_what_does_not_fit(devices, file, monkeypatch, capsys):
    use_chip(monkeypatch, dataclasses.replace(chips.chip_of("TPU v5 lite"), hbm=1e6))
    assert run(file, f"--topology={TOPOLOGY}", "--config.mesh.fsdp=4") == 1
    assert "does not fit on v5e:2x2" in capsys.readouterr().err
    error = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    )
    assert too_large(RuntimeError(error + "107.13G of 95.74G hbm.")) == (
        "it needs 107.1 GiB of the chip's 95.7 GiB of memory"
    )
    assert too_large(RuntimeError("INTERNAL: something else")) is None


def test_the_search_by_command(devices, file, tmp_path, monkeypatch, capsys):
    """The search prints overrides that the command accepts, and reports when no candidate fits."""
    assert run(file, f"--topology={TOPOLOGY}", "--search=1", f"--out={tmp_path}") == 0
    found, output = json.loads((tmp_path / "search.json").read_text()), capsys.readouterr().out
    (trials,) = found["trials"]
    assert trials["fits"] and found["candidates"] == found["fit_by_estimate"] > 50
    assert trials["compiled"]["mesh"]["fsdp"] == trials["mesh"]["fsdp"]
    assert "--config.mesh.replicated=" in output and all(o.split("=")[0] in output for o in found["best"])
    assert run(file, f"--topology={TOPOLOGY}", *found["best"]) == 0

    use_chip(monkeypatch, dataclasses.replace(chips.chip_of("TPU v5 lite"), hbm=2e6))
    assert run(file, f"--topology={TOPOLOGY}", "--search=1") == 1
    assert "none of the 1 compiled candidates fits" in capsys.readouterr().err
    assert run(file, f"--topology={TOPOLOGY}", "--search=0") == 2


def test_collectives_of_a_step_on_a_tensor_axis(devices):
    """Weights are gathered along fsdp, gradients scattered; heads and widths are summed over tensor."""
    found, _ = compiled_step(recipe(MeshConfig(1, 2, 2), ("llama",), trainable=("llama",)), devices)
    kinds = by_kind(found.census)
    assert set(kinds) == {
        ("all-gather", ("fsdp",)),
        ("reduce-scatter", ("fsdp",)),
        ("all-reduce", ("tensor",)),
        ("all-reduce", ("fsdp",)),
        ("all-reduce", ("fsdp", "tensor")),
    }
    weights = bytes_held(found.program.arguments["parameters"]) / 2  # in bfloat16
    # Each layer's weights are gathered in both passes; half of them are already on the device.
    assert kinds["all-gather", ("fsdp",)][1] < 2.2 * weights
    states = ROWS // 2 * LENGTH * 64 * 2  # of one device, bfloat16
    largest = max(c.operand for c in found.census.collectives if c.axes == ("tensor",))
    assert largest <= 2 * states
    assert kinds["all-reduce", ("fsdp", "tensor")][1] < 1024  # losses and norms


def test_a_joint_step_in_micro_batches(devices):
    """With all towers, only gradients cross `data`, and no collective moves activations or logits."""
    trainable = ("llama", "dream_queries", "vision_projector", "condition_projector")
    wanted = recipe(
        MeshConfig(2, 2),
        ("llama", "vision", "unet", "vae"),
        trainable=trainable,
        optim=dict(grad_accum_steps=2),
    )
    found, text = compiled_step(wanted, devices)
    assert found.memory.fits
    state = {k: v for k, v in found.program.arguments.items() if k != "batch"}
    donated = text.split("\n", 1)[0].count("-alias)")
    assert donated == len(jax.tree.leaves(state)) + 2  # all of the state, including its step and its key
    across = {kind for kind, axes in by_kind(found.census) if "data" in axes}
    assert across == {"all-reduce"}
    parameters = max(x.size for x in jax.tree.leaves(found.program.arguments))
    for c in found.census.collectives:
        for shape in c.shapes:
            assert shape.elements <= parameters and all(n % LENGTH for n in shape.dims), c
            assert tiny.VOCABULARY not in shape.dims or len(shape.dims) == 2, c  # the two tables
        assert not (c.kind != "all-reduce" and "data" in c.axes), c
    ratios = {k: 4 * found.census.flops[k] / n for k, n in found.program.model_flops.items()}
    assert all(0.6 < ratio < 1.4 for ratio in ratios.values()), ratios
    assert 0 < to_json(found)["roofline"]["mfu"] < 1


def test_weights_are_gathered_once_a_step_where_asked(devices):
    """Otherwise each of the two micro-batches gathers every layer for both passes: four times in all."""
    optim = dict(grad_accum_steps=2, gather="step")
    wanted = recipe(MeshConfig(1, 4), ("llama",), trainable=("llama",), optim=optim)
    found, _ = compiled_step(wanted, devices)
    weights = 4 * bytes_held(found.program.arguments["parameters"]) / 2  # unsharded, in bfloat16
    kinds = {kind: received for (kind, _), (_, received) in by_kind(found.census).items()}
    assert 0.5 * weights < kinds["all-gather"] < 1.1 * weights
    # Gradients are reduce-scattered in each micro-batch, except that of a table, which XLA all-reduces.
    assert kinds["reduce-scatter"] + kinds["all-reduce"] < 2 * weights


def test_offloaded_states_wait_on_the_host(devices):
    remat = RematConfig(llama="offload")
    wanted = recipe(MeshConfig(1, 4), ("llama",), trainable=("llama",))
    wanted = dataclasses.replace(wanted, model=dataclasses.replace(wanted.model, remat=remat))
    found, _ = compiled_step(wanted, devices)
    states = ROWS // 4 * LENGTH * 64 * 2  # of one device, bfloat16
    assert wanted.model.llama.num_hidden_layers == 2
    assert found.memory.host >= 2 * states


def test_micro_batches_compile_with_full_effort(devices):
    """Compiles as a run does. XLA's default pass that moves reductions out of loops fails here."""
    wanted = recipe(MeshConfig(1, 4), ("llama",), trainable=("llama",), optim=dict(grad_accum_steps=2))
    found, _ = compiled_step(wanted, devices, "full")
    # Each micro-batch scatters its gradients, so that no device holds unsharded gradients.
    scattered = found.census.collectives
    assert sum(c.times for c in scattered if c.kind == "reduce-scatter") >= 2 and found.memory.fits


@pytest.mark.parametrize("name", ["prefill", "decode", "denoise"])
def test_generation_compiles(devices, name):
    towers = ("llama", "unet", "vae") if name == "denoise" else ("llama",)
    wanted = recipe(MeshConfig(1, 2, 2), towers, trainable=("llama",))
    found, _ = compile_and_report(wanted, generation_program(wanted, name, 4, devices), TOPOLOGY, "low")
    assert found.memory.fits and found.roofline.bound > 0
    assert bool(found.census.data_dependent_loops) == (name == "decode")
