"""The benchmark against PyTorch: the order of timing, the arithmetic, and the agreement of the two sides."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.beside_torch import bounds, report, timing
from benchmarks.beside_torch.__main__ import NAMES, main, parse, run
from benchmarks.beside_torch.inputs import Inputs
from benchmarks.beside_torch.sizes import make_size
from dreamllm_jax.config.train import OptimConfig
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.optim import make_optimizer


def test_sides_alternate():
    calls = []
    works = {
        name: timing.Work(lambda n=name: calls.append(n), lambda n=name: calls.append(f"prepare {n}"))
        for name in ("ours", "theirs")
    }
    found = timing.alternate(works["ours"], works["theirs"], pairs=3, pause=0.0)
    runs = [name for name in calls if name in works]
    assert runs == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert calls[::2] == [f"prepare {name}" for name in calls[1::2]]
    assert len(found.ours) == len(found.theirs) == 3


def test_sides_that_do_not_fit_together_alternate_in_blocks():
    made = []

    def make(name):
        made.append(name)
        return timing.Work(lambda: None)

    found = timing.time_in_blocks(lambda: make("ours"), lambda: make("theirs"), pairs=3)
    assert made == ["ours", "theirs", "theirs", "ours"]
    assert len(found.ours) == len(found.theirs) == 4


def test_ratios_compare_neighbouring_repetitions():
    found = timing.Timing(ours=(1.0, 2.0, 4.0), theirs=(3.0, 2.0, 8.0)).summary()
    assert found == dict(ours_s=2.0, theirs_s=3.0, ratio=2.0, ratio_low=1.5, ratio_high=2.5, pairs=3)
    assert timing.Timing((1.0,), (2.0,)).summary()["ratio_low"] == 2.0


def test_bytes_read_per_token():
    """Counts all weights except the embedding table and the norms, and the cache at its mean length."""
    size = make_size("smallest", "float32")
    llama = {k: x for k, x in abstract_params(size.model).items() if k.startswith("llama/")}
    kernels = sum(math.prod(x.shape) for k, x in llama.items() if k.endswith("/kernel"))
    lengths = [size.prompt + decoded for decoded in range(1, size.new_tokens + 1)]
    cache = 2 * 2 * 2 * 8 * np.mean(lengths)  # keys and values, layers, heads, width
    assert bounds.token_bytes(size, 1) == 4 * (kernels + cache)
    assert bounds.token_bytes(size, 3) == 4 * (kernels + 3 * cache)
    assert 2 * bounds.token_bytes(make_size("smallest", "bfloat16"), 1) == bounds.token_bytes(size, 1)


@pytest.mark.parity
def test_bfloat16_training_needs_float32_weights_on_both_sides():
    """Without them small updates round away: the losses of the size tiny differed by 7.6 %."""
    pytest.importorskip("torch")
    from benchmarks.beside_torch import ours, theirs
    from benchmarks.beside_torch.torch_optim import Optimizer

    size = make_size("smallest", "bfloat16")
    inputs = Inputs(dataclasses.replace(size, optim=OptimConfig(learning_rate=1e-4)))
    our_step, noise, losses = ours.Step(inputs, "stage2"), [], []
    for _ in range(4):
        noise.append(our_step.next_noise())
        losses.append(our_step())

    def error(masters: bool) -> float:
        step = theirs.Step(inputs, "stage2", theirs.TorchSettings("cpu", compiled=False))
        if not masters:  # the parameters themselves are updated, in bfloat16
            step.optimizer = Optimizer(step.optimizer.parameters, None, step.stage.optim)
            step.optimizer._gradients = lambda: (p.grad for p in step.optimizer.parameters)
        errors = []
        for one, loss in zip(noise, losses, strict=True):
            step.set_noise(one)
            errors.append(abs(step() - loss) / loss)
        return max(errors)

    assert error(masters=True) < 2e-3 < 4e-3 < error(masters=False)


@pytest.mark.parity
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_both_sides_have_the_same_optimizer(optimizer):
    """On a matrix that Adafactor factors, one that it does not, and a vector; gradients are clipped."""
    torch = pytest.importorskip("torch")
    from benchmarks.beside_torch.torch_optim import Optimizer

    mu = "bfloat16" if optimizer == "adafactor" else "float32"
    config = OptimConfig(optimizer=optimizer, mu_dtype=mu, learning_rate=1e-2)
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (128, 160), "b/kernel": (5, 200), "c/scale": (130,)}
    ours = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    first = dict(ours)
    weights = [torch.tensor(x, requires_grad=True) for x in ours.values()]
    tx, theirs = make_optimizer(config), Optimizer(weights, None, config)
    state = tx.init(ours)
    for _ in range(3):
        gradients = {name: rng.standard_normal(x.shape, np.float32) for name, x in ours.items()}
        updates, state = tx.update(gradients, state, ours)
        ours = {name: x - 1e-2 * np.asarray(updates[name]) for name, x in ours.items()}
        for weight, gradient in zip(weights, gradients.values(), strict=True):
            weight.grad = torch.tensor(gradient)
        theirs.step()
    for weight, (name, x) in zip(weights, ours.items(), strict=True):
        moved = np.linalg.norm(x - first[name])
        assert moved > 0.01 and np.linalg.norm(weight.detach().numpy() - x) < 5e-3 * moved, name


@pytest.mark.parity
def test_the_decoder_of_images_counts():
    """All that PyTorch counts, and the attention in the middle, which it does not count on a CPU."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.beside_torch.towers import TorchSettings, Towers

    size = make_size("smallest", "float32")
    side, images, width = size.model.latent_size, size.num_images, 8
    vae = Towers(Inputs(size), TorchSettings("cpu", compiled=False)).vae
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(images, 4, side, side))
    attention = images * 2 * 2 * side**4 * width
    assert bounds.decoder_flops(size) == counter.get_total_flops() + attention
    without = bounds.image_flops(dataclasses.replace(size, steps=0))
    assert without == bounds.decoder_flops(size)


def test_the_command_line():
    assert parse([]).cases == parse(["all"]).cases == list(NAMES)
    assert parse(["decode", "--size=full"]).cases == ["decode"]
    for wrong in (["decoding"], ["decode", "--document=x"], ["--pairs=0"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_each_case_has_its_own_process_on_a_cpu(monkeypatch, tmp_path, capsys):
    commands = []

    def measure(command, **_):
        commands.append(command)
        name = command[3]
        result = {
            "environment": {"command": name, "load": len(commands)},
            "results": {f"{name}, 1": {"ratio": 2}},
        }
        Path(command[4].removeprefix("--json=")).write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, int(name == "documents"))

    monkeypatch.setattr(subprocess, "run", measure)
    monkeypatch.setattr(
        "sys.argv", ["x", "decode", "prefill", "--pairs=3", f"--json={tmp_path / 'all.json'}"]
    )
    assert main() == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found["results"]) == ["decode, 1", "prefill, 1"]
    environment = found["environment"]
    assert environment["load"] == 1
    assert environment["command"].endswith("beside_torch decode prefill --pairs=3")
    assert all({"--pairs=3", "--size=tiny", "--device=cpu"} <= set(command) for command in commands)
    monkeypatch.setattr("sys.argv", ["x", "decode", "documents", "--rows=2"])
    assert main() == 1 and "The case documents failed" in capsys.readouterr().err
    assert "--rows=2" in commands[-1]


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("torch")
    return run(parse(["--size=smallest", "--pairs=2"]))


@pytest.mark.parity
def test_all_cases_agree_and_are_timed(found):
    assert json.loads(json.dumps(found)) == found
    kinds = ["joint, stage2", "prefill, 1", "prefill, 2", "decode, 1", "decode, 2"]
    kinds += ["text to image", "document"]
    assert len(found["results"]) == len(kinds)
    for kind, (name, result) in zip(kinds, found["results"].items(), strict=True):
        assert name.startswith(kind)
        assert result["pairs"] == 2 and result["ours_s"] > 0 and result["theirs_s"] > 0
        assert result["errors"] and all(e >= 0 for e in result["errors"].values()), name
    environment = found["environment"]
    assert environment["threads"]["torch"] == environment["threads"]["cores"]
    assert environment["versions"]["jax"]


@pytest.mark.parity
def test_sides_that_differ_are_not_timed():
    pytest.importorskip("torch")
    from benchmarks.beside_torch import cases

    session = cases.Session(Inputs(make_size("smallest", "float32")), None, 1)
    assert session.check_agreement("x", {"loss": 9e-5}) == {"loss": 9e-5}
    for wrong in ({"loss": 2e-4}, {"loss": float("nan")}, {"tokens": 0.1}):
        with pytest.raises(timing.Disagreement, match="the two sides differ"):
            session.check_agreement("x", wrong)


@pytest.mark.parity
def test_the_table(found):
    lines = report.rows(found)
    assert all(any(line.startswith(f"| {name} | ") for line in lines) for name in found["results"])
    assert found["environment"]["device"] in lines[-1]
