"""Two processes of four devices do what one process of eight does: train, save, resume, load, generate.

Two are preempted and resume. One trains without interruption, and resumes the run of the two.
"""

import copy
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.train.hooks.loggers import read_curves
from dreamllm_jax.train.preparation import prepare_tokenizer
from dreamllm_jax.train.state import stage_seed
from tests.distributed.program import ASKED_AGAIN_AT, ASKED_AT, STEPS, fingerprints
from tests.folders import load_pretrained
from tests.train.tiny_recipe import RECIPE

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch" / "local_processes.sh"


def started(folder: Path, processes: int, devices: int, mapping: dict, *other: Path) -> SimpleNamespace:
    """Returns the results and the output of this many processes."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(mapping))
    command = [str(LAUNCH), str(processes), "--devices", str(devices), "--"]
    command += [sys.executable, "-m", "tests.distributed.program", str(folder), str(folder / "recipe.json")]
    result = subprocess.run(
        [*command, *map(str, other)],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    made = [json.loads((folder / f"{i}.json").read_text()) for i in range(processes)]
    model = load_pretrained(folder / made[0]["trained"])
    return SimpleNamespace(made=made, model=model, said=result.stdout, **left(folder / "run"))


def left(run: Path) -> dict:
    """Returns the curves and the data statistics of each stage."""
    stages = sorted((run / "stages").iterdir())
    return dict(
        curves={p.name: list(read_curves(p / "logs")) for p in stages},
        validation={p.name: list(read_curves(p / "logs", "validation")) for p in stages},
        samples=sorted(str(p.relative_to(run)) for p in run.rglob("*.html")),
        counts={p.name: json.loads((p / "done.json").read_text())["data"] for p in stages},
    )


@pytest.fixture(scope="module")
def mapping():
    # Parameters are sliced over both processes: neither can write, read or use them alone.
    mapping = copy.deepcopy(RECIPE) | {"mesh": dict(data=1, fsdp=4, tensor=2), "checkpoint_every": 100}
    mapping["hooks"] = dict(
        eval_every=2, eval_batches=2, sample_every=STEPS, sample_prompts=["Count", "Which"]
    )
    mapping["stages"][1] |= dict(trainable=(*RECIPE["stages"][1]["trainable"], "llama"), steps=STEPS)
    return mapping


@pytest.fixture(scope="module")
def runs(mapping, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    two, handed_over = started(folder / "two", 2, 4, mapping), folder / "two" / "ended"
    one = started(folder / "one", 1, 8, mapping, handed_over)
    one.went_on = SimpleNamespace(**left(handed_over))
    return one, two


def ended_after(run) -> int:
    """Returns the step after which a run was preempted, the same on all processes."""
    (sentence,) = {m["sentence"] for m in run.made}
    words = sentence.split()
    assert words[0] == "joint:"
    return int(words[words.index("step") + 1])


def assert_same_curves(ours: list[dict], theirs: list[dict], stage: str) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-4, err_msg=f"{stage} {name}")


def test_both_see_all_devices(runs):
    one, two = runs
    assert [m["devices"] for m in one.made] == [[8, 8]]
    assert [m["devices"] for m in two.made] == [[4, 8], [4, 8]]


def test_no_process_loads_compiled_programs(runs):
    """On CPUs their collectives run in no fixed order: devices would deadlock, or gloo fail."""
    assert not any(m["cached"] for run in runs for m in run.made)


def test_training_is_the_same(runs):
    """Losses, gradient norm and counts of every step are equal, and so are the weights that both wrote."""
    one, two = runs
    assert one.curves.keys() == two.curves.keys() == {"0_vae", "1_joint"}
    for stage, records in one.curves.items():
        assert_same_curves(two.curves[stage], records, stage)
    for path, value in one.model.params.items():
        if path.endswith("to_k/bias"):
            continue  # softmax takes it away: its gradient is rounding alone, which Adam makes large
        ours = np.asarray(two.model.params[path], np.float64)
        error = np.linalg.norm(ours - value) / (np.linalg.norm(value) + 1e-6)
        assert error < 2e-3, (path, error)


def test_all_end_and_resume_at_one_step(runs):
    """One process received the SIGTERM, in the middle of the last stage."""
    one, two = runs
    step = ended_after(two)
    assert ASKED_AT <= step < ASKED_AGAIN_AT and f"joint: resumes after step {step} of {STEPS}" in two.said
    assert ended_after(one) == ASKED_AGAIN_AT
    assert f"joint: resumes after step {ASKED_AGAIN_AT} of {STEPS}" in one.said
    for run in (*runs, one.went_on):
        assert [r["step"] for r in run.curves["1_joint"]] == list(range(1, STEPS + 1))


def test_another_number_of_processes_goes_on(runs):
    """One process resumes what two began: every step is as in an uninterrupted run."""
    one, two = runs
    step = ended_after(two)
    assert f"joint: resumes after step {step} of {STEPS}" in one.said
    assert one.went_on.curves["1_joint"][:step] == two.curves["1_joint"][:step]
    assert_same_curves(one.went_on.curves["1_joint"][step:], one.curves["1_joint"][step:], "joint")
    assert one.went_on.counts == one.counts == two.counts


def test_hooks_run_on_all_processes(runs):
    """Validation losses are equal, and process 0 writes the samples of all; a preempted step has no hooks."""
    one, two = runs
    preempted = {ended_after(two)}
    for run, without in ((one, set()), (two, preempted), (one.went_on, preempted | {ended_after(one)})):
        assert run.samples == [f"stages/1_joint/samples/step_{STEPS:08d}/{i}.html" for i in (0, 1)]
        assert [r["step"] for r in run.validation["0_vae"]] == [2]
        expected = [step for step in (2, 4, 6, STEPS) if step not in without]
        assert [r["step"] for r in run.validation["1_joint"]] == expected
        for stage, records in run.validation.items():
            uninterrupted = {r["step"]: r for r in one.validation[stage]}
            assert_same_curves(records, [uninterrupted[r["step"]] for r in records], f"validation of {stage}")


def test_no_row_is_skipped_or_read_twice(runs, mapping):
    """Each process reads its own rows, however often and with how many processes the run resumes."""
    one, two = runs
    recipe = build_recipe(mapping)
    stage, tokenizer = recipe.stages[-1], prepare_tokenizer(recipe)
    with closing(
        batches(stage.data, recipe.model, tokenizer, seed=stage_seed(recipe, stage), null_dream=True)
    ) as stream:
        expected = [fingerprints(next(stream)) for _ in range(STEPS)]
    assert len({row for rows in expected for row in rows}) == STEPS * stage.data.batch_size
    assert [list(rows.values()) for rows in one.made[0]["rows"]] == expected + expected[ended_after(two) :]
    first, second = (m["rows"] for m in two.made)
    assert [[*a.values(), *b.values()] for a, b in zip(first, second, strict=True)] == expected
    assert [list(first[0]), list(second[0])] == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]


def test_generation_is_the_same_on_every_process(runs):
    one, two = runs
    for name in ("texts", "document", "picture"):
        assert two.made[0][name] == two.made[1][name]
    assert two.made[0]["texts"] == one.made[0]["texts"]
    kinds = [[type(part) for part in run.made[0]["document"]] for run in runs]
    assert kinds[0] == kinds[1]
    for ours, theirs in zip(two.made[0]["document"], one.made[0]["document"], strict=True):
        assert ours == theirs if isinstance(theirs, str) else np.abs(np.subtract(ours, theirs)).max() <= 2
    assert np.abs(np.subtract(two.made[0]["picture"], one.made[0]["picture"])).max() <= 2


def test_process_0_alone_prints(runs):
    _, two = runs
    lines = two.said.splitlines()
    assert any(line.startswith("[0] joint: resumes") for line in lines)
    assert not any(line.startswith("[1] joint") for line in lines)


def test_held_out_losses_are_the_same_on_every_process(runs):
    one, two = runs
    losses = one.made[0]["losses"]
    assert losses.keys() >= {"loss_lm", "loss_vm", "perplexity"}
    assert two.made[0]["losses"] == two.made[1]["losses"]
    for name, loss in losses.items():
        np.testing.assert_allclose(two.made[0]["losses"][name], loss, rtol=1e-4, err_msg=name)
