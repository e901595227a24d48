"""Two processes of four devices do what one process of eight does: train, save, resume, load, generate.

Two are ended and go on; one trains at one go, and goes on where the two were ended.
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

from dreamllm_jax.config.train import recipe as build_recipe
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.train.metrics import read_curves
from dreamllm_jax.train.preparation import prepare_tokenizer
from dreamllm_jax.train.state import stage_seed
from tests.distributed.program import ASKED_AGAIN_AT, ASKED_AT, STEPS, fingerprints
from tests.folders import load_pretrained
from tests.train.test_loop import RECIPE

HERE = Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch" / "local_processes.sh"


def started(folder: Path, processes: int, devices: int, mapping: dict, *other: Path) -> SimpleNamespace:
    """What so many processes leave, and what they said."""
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(mapping))
    command = [str(LAUNCH), str(processes), "--devices", str(devices), "--"]
    command += [sys.executable, "-m", "tests.distributed.program", str(folder), str(folder / "recipe.json")]
    result = subprocess.run(
        [*command, *map(str, other)], cwd=HERE.parents[1], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    made = [json.loads((folder / f"{i}.json").read_text()) for i in range(processes)]
    model = load_pretrained(folder / made[0]["trained"])
    return SimpleNamespace(made=made, model=model, said=result.stdout, **left(folder / "run"))


def left(run: Path) -> dict:
    """The curves of each stage, and what its end says of the data."""
    stages = sorted((run / "stages").iterdir())
    return dict(
        curves={p.name: list(read_curves(p / "logs")) for p in stages},
        counts={p.name: json.loads((p / "done.json").read_text())["data"] for p in stages},
    )


@pytest.fixture(scope="module")
def mapping():
    # Parameters are sliced over both processes: neither can write, read or use them alone.
    mapping = copy.deepcopy(RECIPE) | {"mesh": dict(data=1, fsdp=4, tensor=2), "checkpoint_every": 100}
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
    """The step that the processes of a run say they were ended after: the same on all."""
    (sentence,) = {m["sentence"] for m in run.made}
    words = sentence.split()
    assert words[0] == "joint:"
    return int(words[words.index("step") + 1])


def check_same_curves(ours: list[dict], theirs: list[dict], stage: str) -> None:
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
    """Their collectives come in any order on CPUs: eight devices waited for each other, or gloo gave up."""
    assert not any(m["cached"] for run in runs for m in run.made)


def test_training_is_the_same(runs):
    """Every step's losses, gradient norm and counts, and the weights, which two processes wrote together."""
    one, two = runs
    assert one.curves.keys() == two.curves.keys() == {"0_vae", "1_joint"}
    for stage, records in one.curves.items():
        check_same_curves(two.curves[stage], records, stage)
    for path, value in one.model.params.items():
        if path.endswith("to_k/bias"):
            continue  # softmax takes it away: its gradient is rounding alone, which Adam makes large
        ours = np.asarray(two.model.params[path], np.float64)
        error = np.linalg.norm(ours - value) / (np.linalg.norm(value) + 1e-6)
        assert error < 2e-3, (path, error)


def test_all_end_and_resume_at_one_step(runs):
    """The notice came to one process alone, in the middle of the last stage."""
    one, two = runs
    step = ended_after(two)
    assert ASKED_AT <= step < ASKED_AGAIN_AT and f"joint: resumes after step {step} of {STEPS}" in two.said
    assert ended_after(one) == ASKED_AGAIN_AT
    assert f"joint: resumes after step {ASKED_AGAIN_AT} of {STEPS}" in one.said
    for run in (*runs, one.went_on):
        assert [r["step"] for r in run.curves["1_joint"]] == list(range(1, STEPS + 1))


def test_another_number_of_processes_goes_on(runs):
    """One process, where two were ended: every step is as in the run that nothing ended."""
    one, two = runs
    step = ended_after(two)
    assert f"joint: resumes after step {step} of {STEPS}" in one.said
    assert one.went_on.curves["1_joint"][:step] == two.curves["1_joint"][:step]
    check_same_curves(one.went_on.curves["1_joint"][step:], one.curves["1_joint"][step:], "joint")
    assert one.went_on.counts == one.counts == two.counts


def test_no_row_is_skipped_or_read_twice(runs, mapping):
    """Each process reads its own rows, however often and by whomever the run went on."""
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
