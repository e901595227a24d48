"""Full published shapes against PyTorch, and the table of the handbook."""

import re
from pathlib import Path

import pytest

from benchmarks.fidelity.__main__ import GOLDEN, measure, rows
from benchmarks.fidelity.cases import BOUNDS, CASES
from dreamllm_jax.parity.errors import exceeding

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "fidelity.md"
QUICK = ("clip",)  # takes half a minute; the others run before a release
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES]
EXPECTED = {
    "llama": {"output.logits", "gradient.embeds", "bfloat16.logits"},
    "clip": {f"output.{n}" for n in ("features", "vision", "states", "text")}
    | {"gradient.pixels", "bfloat16.features", "bfloat16.states"},
    "llava": {"output.logits", "gradient.pixels", "bfloat16.logits"},
    "unet": {f"{kind}.{n}" for kind in ("output", "bfloat16") for n in ("unet", "moments", "decoded")}
    | {"gradient.latents", "gradient.context"},
}


@pytest.mark.parity
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", MARKED)
def test_full_shapes(name, tmp_path):
    pytest.importorskip("torch")
    errors = measure(name, tmp_path)
    gradients = {n.removeprefix("gradient.") for n in errors if n.startswith("gradient.")}
    expected = EXPECTED[CASES[name].kind] | ({"gradient.text_embeds"} if name == "sdxl" else set())
    assert errors.keys() == expected | {f"bfloat16.gradient of {n}" for n in gradients}
    assert not exceeding(errors, BOUNDS)
    assert not list(tmp_path.iterdir())  # the case removes its gigabytes


def test_bounds():
    assert exceeding({"output.x": 2e-4, "gradient.x": 9e-5, "bfloat16.x": 1.2}, BOUNDS) == {"output.x": 2e-4}
    assert exceeding({"gradient.x": float("nan"), "bfloat16.x": 1.3}, BOUNDS).keys() == {
        "gradient.x",
        "bfloat16.x",
    }


def test_the_handbook_has_every_case_within_its_bounds():
    table = re.search(r"<!-- fidelity -->\n(.*?)<!-- /fidelity -->", DOCUMENT.read_text(), re.DOTALL)[1]
    lines = {cells[1].strip(): cells[2:5] for line in table.splitlines() if (cells := line.split("|"))}
    for name, description in GOLDEN.items() | {(n, case.description) for n, case in CASES.items()}:
        cells = lines[description][:2] if name in GOLDEN else lines[description]
        output, gradient, bfloat16 = (*map(float, cells), 0.0)[:3]
        assert output <= (1e-3 if name in GOLDEN else BOUNDS["output"]), name  # final latents and images
        assert gradient <= BOUNDS["gradient"] and bfloat16 <= BOUNDS["bfloat16"], name


def test_the_table():
    results = {
        "dreamllm-a": {
            "loss": 1e-6,
            "out.logits": 2e-5,
            "t2i.image": 3e-4,
            "grad.x": 4e-6,
            "gen.greedy_ids": 0,
        },
        "clip": {"output.a": 1e-6, "output.b": 2e-6, "gradient.a": 3e-6, "bfloat16.a": 0.987},
    }
    text = "\n".join(rows(results))
    assert text.count("\n|") == 3
    assert "| 3.0e-04 | 4.0e-06 |  |" in text and "| 2.0e-06 | 3.0e-06 | 0.99 |" in text
