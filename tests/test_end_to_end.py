"""The main job in small, nothing stood in for: train the handwriting recipe, evaluate, load, generate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreamllm_jax import Document, DreamLLM
from tests.programs import QUICK_COMPILE

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "examples/handwriting/config.py"
SMALL = (
    "--config.generation.num_inference_steps=2",
    "--config.generation.max_new_tokens=4",
    "--config.generation.max_images=1",
)


def run(module: str, *arguments: str) -> str:
    """What a command prints, as a user would start it: on one device, outside this process.

    It compiles quickly, though: four steps of every stage are a program each.
    """
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": " ".join(QUICK_COMPILE)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    out = run("dreamllm_jax.train", f"--config={RECIPE}:tiny", f"--workdir={folder}", *SMALL)
    assert f"trained: {folder}/stages/7_stage3/model" in out
    run("examples.handwriting.evaluate", f"--workdir={folder}")
    return folder


def test_what_a_newcomer_is_left_with(workdir):
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert {
        "creation_accuracy",
        "creation_diversity",
        "comprehension_accuracy",
        "document_accuracy",
        "seconds_total",
        "peak_rss_gib",
    } <= metrics.keys() & metrics["measured_on"].keys()
    assert [s["name"] for s in metrics["stages"]] == [
        *("stage0_vae", "stage0_clip", "stage0_unet", "stage0_language"),
        *("stage1_comprehension", "stage1_creation", "stage2", "stage3", "evaluation"),
    ]
    assert all(s["seconds"] > 0 and s["peak_rss_gib"] > 0 for s in metrics["stages"])
    # Four steps teach nothing: a score would be an error of the evaluation.
    assert metrics["judge_accuracy"] >= 0.97 and metrics["document_accuracy"] == 0
    report = (workdir / "report.html").read_text()
    assert report.count("data:image/") > 200 and "http" not in report.replace("http://www.w3.org", "")


def test_the_results_load_and_generate(workdir):
    model = DreamLLM.from_pretrained(workdir / "checkpoint")
    last = DreamLLM.from_pretrained(workdir / "stages" / "7_stage3" / "model")
    assert model.config.text is None and last.config.text is not None
    prompt = Document([Image.new("RGB", (16, 16), "white"), "Which digit is this?"])
    assert model.generate_text(prompt) == last.generate_text(prompt)
    pictures = [m.generate_images("a handwritten seven", seed=1)[0] for m in (model, last)]
    assert pictures[0].size == (16, 16) and pictures[0].tobytes() == pictures[1].tobytes()
    document = model.generate_document("Write two plus five.", seed=1)
    assert isinstance(document, Document) and len(document.images) <= 1


def test_run_again_it_says_that_it_is_done(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    out = run("dreamllm_jax.train", f"--config={RECIPE}:tiny", f"--workdir={workdir}", *SMALL)
    assert out.count(": done") == 8
    assert "evaluated before, nothing to do" in run("examples.handwriting.evaluate", f"--workdir={workdir}")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before
