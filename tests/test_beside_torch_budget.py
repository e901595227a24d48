"""The benchmark within a budget: its schedule, its file, its table and its chart."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.beside_torch import budget, jobs, summary
from benchmarks.beside_torch.__main__ import main, parse
from benchmarks.beside_torch.schedule import Results, Schedule, Stopped
from benchmarks.beside_torch.sizes import make_size

# Speaks as a worker does. It works for a while, then measures its rows, and writes down when it did both.
WORKER = """
import json, sys, time, numpy
settings = json.loads(sys.argv[1])
folder, title, loss = settings["folder"], settings["title"], settings["loss"]
def say(**message): print(json.dumps(message), flush=True)
def note(kind): print(kind, time.monotonic(), file=open(f"{folder}/{title}.times", "a"))
say(state="hello", environment={"device": "a chip"})
if settings["ending"] == "crash": sys.exit("out of luck")
for row, column in settings["cells"]:
    for _ in range(settings["ticks"]):
        time.sleep(0.01); note("prepare")
    say(state="ready", row=row, column=column)
    sys.stdin.readline()
    note("begin"); time.sleep(0.1); note("end")
    if settings["ending"] == "unsupported":
        say(state="failed", row=row, column=column, reason="not on this chip")
        continue
    numpy.savez(f"{folder}/{title}.npz", loss=[loss])
    cell = {"seconds": 0.1, "repetitions": [0.1], "result": f"{title}.npz"}
    say(state="measured", row=row, column=column, cell=cell, bound={"flops": 5.0} if column == "ours" else {})
"""


def job(name: str, side: str, gib: float = 1, rows: int = 1) -> jobs.Job:
    return jobs.Job(name, side, tuple((f"{name} {i}", side) for i in range(rows)), gib)


def schedule(folder: Path, found: list[jobs.Job], **settings) -> tuple[Schedule, list[str]]:
    """Returns a schedule of such workers, and what it will have said. `settings` may be by title."""
    options = dict(seconds=60.0, together=3, gib=10.0, least=0.0) | {
        k: settings.pop(k) for k in ("seconds", "together", "gib", "least") if k in settings
    }

    def command(one: jobs.Job) -> list[str]:
        given = dict(ticks=5, ending="", loss=2.0) | (settings[one.side] if one.side in settings else {})
        given |= dict(folder=str(folder), title=f"{one.name}.{one.side}", cells=one.cells)
        return [sys.executable, "-c", WORKER, json.dumps(given)]

    said: list[str] = []
    about = {"command": "python -m x", "dtype": "float32"}
    return Schedule(found, Results(folder, found, about), command, say=said.append, **options), said


def times(folder: Path, title: str) -> list[tuple[str, float]]:
    lines = (folder / f"{title}.times").read_text().splitlines()
    return [(kind, float(at)) for kind, at in map(str.split, lines)]


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_processes_prepare_together_and_measure_alone(tmp_path):
    found = [job("a", "ours"), job("a", "eager", rows=2), job("a", "compiled")]
    one, _ = schedule(tmp_path, found, compiled=dict(ticks=40))
    one.run()
    everything = {side: times(tmp_path, f"a.{side}") for side in jobs.SIDES}
    for side, own in everything.items():
        begins, ends = ([at for kind, at in own if kind == name] for name in ("begin", "end"))
        for begin, end in zip(begins, ends, strict=True):
            others = [at for name, all_ in everything.items() if name != side for _, at in all_]
            # A signal takes a moment to arrive.
            assert not [at for at in others if begin + 0.03 < at < end - 0.01], side
    first = {side: own[0][1] for side, own in everything.items()}
    last = {side: own[-1][1] for side, own in everything.items()}
    assert first["compiled"] < max(last["ours"], last["eager"])  # it did prepare beside another
    rows = read(tmp_path)["rows"]
    assert rows["a 0"]["flops"] == 5.0 and rows["a 0"]["columns"]["eager"]["errors"] == {"loss": 0.0}
    assert all(cell["seconds"] == 0.1 for row in rows.values() for cell in row["columns"].values())


def test_memory_and_our_own_compilations_limit_what_prepares_together(tmp_path):
    """A job that needs more than the device has runs alone; of ours, one at a time."""
    found = [
        job("a", "ours", gib=6),
        job("b", "ours", gib=1),
        job("b", "eager", gib=5),
        job("c", "eager", gib=99),
    ]
    one, _ = schedule(tmp_path, found)
    one.run()
    spans = {}
    for each in found:
        own = times(tmp_path, f"{each.name}.{each.side}")
        spans[each.title] = own[0][1], own[-1][1]

    def overlap(x: str, y: str) -> bool:
        return spans[x][0] < spans[y][1] and spans[y][0] < spans[x][1]

    assert not overlap("a, ours", "b, ours") and not overlap("a, ours", "b, eager")
    assert not any(overlap("c, eager", title) for title in spans if title != "c, eager")


def test_each_row_is_written_at_once_and_what_does_not_fit_is_listed(tmp_path):
    found = [job("a", "ours"), job("b", "ours", rows=2), job("c", "ours")]
    seen = []
    one, said = schedule(tmp_path, found, together=1, seconds=3.0, ours=dict(ticks=1))

    def watch(line: str) -> None:
        said.append(line)
        if line.endswith(" 0.1 s"):
            columns = [
                (row, cell) for row, x in read(tmp_path)["rows"].items() for cell in x["columns"].values()
            ]
            seen.append([row for row, cell in columns if "seconds" in cell])

    def command(one_job: jobs.Job, inner=one.command) -> list[str]:
        return (
            [sys.executable, "-c", "import time; time.sleep(60)"] if one_job.name == "c" else inner(one_job)
        )

    one.say, one.command = watch, command
    start = time.monotonic()
    one.run()
    assert time.monotonic() - start < 10
    assert seen[0] == ["a 0"] and seen == [["a 0"], ["a 0", "b 0"], ["a 0", "b 0", "b 1"]][: len(seen)]
    reason = read(tmp_path)["rows"]["c 0"]["columns"]["ours"]["not_measured"]
    assert reason.startswith("no time left: the budget is 3 s")
    assert f"- Not measured: c 0, ours: {reason}." in summary.table(read(tmp_path))


def test_a_process_that_fails_is_reported_and_the_others_go_on(tmp_path):
    found = [job("a", "ours"), job("a", "eager"), job("a", "compiled")]
    one, _ = schedule(
        tmp_path, found, eager=dict(ending="crash"), compiled=dict(ending="unsupported"), ours=dict(ticks=20)
    )
    one.run()
    columns = read(tmp_path)["rows"]["a 0"]["columns"]
    assert columns["ours"]["seconds"] == 0.1
    assert columns["eager"] == {"not_measured": "its process ended with code 1: out of luck", "failed": True}
    assert columns["compiled"] == {"not_measured": "not on this chip"}
    assert summary.faulty(read(tmp_path))
    del columns["eager"]["failed"]
    assert not summary.faulty({"rows": {"a 0": {"columns": columns}}})


def test_what_was_measured_stays_when_the_benchmark_is_stopped(tmp_path):
    found = [job("a", "ours", rows=2), job("b", "ours")]
    one, _ = schedule(tmp_path, found)

    def stop(line: str) -> None:
        if line.endswith(" 0.1 s"):
            raise Stopped

    one.say = stop
    one.run()
    rows = read(tmp_path)["rows"]
    assert rows["a 0"]["columns"]["ours"]["seconds"] == 0.1
    reason = "the benchmark was stopped"
    assert rows["a 1"]["columns"]["ours"]["not_measured"].startswith(reason)
    assert rows["b 0"]["columns"]["ours"]["not_measured"] == reason


def test_a_side_that_computes_something_else_is_not_compared(tmp_path):
    one, _ = schedule(tmp_path, [job("a", "eager"), job("a", "ours")], eager=dict(loss=2.1))
    one.run()
    found = read(tmp_path)
    assert found["rows"]["a 0"]["columns"]["eager"]["differs"] == {"loss": pytest.approx(0.05)}
    assert summary.ratio(found["rows"]["a 0"]) is None and summary.faulty(found)
    assert "- Not comparable: a 0, eager: the result differs from ours (loss by 0.05)." in summary.table(
        found
    )
    assert not summary.chart(found, tmp_path / "chart.png")


def test_the_jobs_in_their_order():
    size = make_size("full", "bfloat16")
    found = jobs.plan(jobs.NAMES, jobs.SIDES, size, "gpu")
    assert [one.name for one in found[::3]] == ["stage1", "text", "text_to_image", "stage2", "kernels"]
    assert [one.side for one in found[:3]] == ["ours", "eager", "compiled"]
    assert found[3].cells == tuple(
        (row, "ours")
        for row in (
            "decode, 1 x 128 tokens",
            "decode, 8 x 128 tokens",
            "prefill, 1 x 1024 tokens",
            "prefill, 8 x 1024 tokens",
        )
    )
    assert {column for _, column in found[12].cells} == {"xla", "chunked", "cudnn"}
    assert {one.side for one in jobs.plan(("text",), jobs.SIDES[:2], size, "gpu")} == {"ours", "eager"}


def test_options(tmp_path, monkeypatch, capsys):
    found = parse(["--budget=100", f"--out={tmp_path}"])
    assert found.cases == ["joint", "prefill", "decode", "text_to_image", "kernels"]
    for wrong, message in (
        (["--budget=100"], "--budget and --out belong together"),
        (["--out=x"], "--budget and --out belong together"),
        (["--budget=1", "--out=x"], "--budget is 1; it must be at least 20 seconds"),
        (["--budget=100", "--out=x", "--together=0"], "--together is 0; it must be at least 1"),
        (["--budget=100", "--out=x", "--rows=2"], "--rows belongs to the mode without --budget"),
        (["documents", "--budget=100", "--out=x"], "unknown with --budget: documents; give joint, prefill"),
        (["kernels"], "unknown without --budget: kernels; give joint, prefill"),
    ):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert message in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x", "--budget=100", f"--out={tmp_path / 'new'}", "--device=gpu"])
    assert main() == 1 and "nvidia-smi was not found" in capsys.readouterr().err


@pytest.mark.parametrize(("mib", "rows"), [(81559, 1), (143771, 4)])
def test_stage2_has_one_row_on_a_smaller_gpu(tmp_path, monkeypatch, mib, rows):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {mib}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    commands = []

    def run(self):
        commands.extend(self.command(one) for one in self.jobs)

    monkeypatch.setattr(Schedule, "run", run)
    options = parse(["--budget=500", f"--out={tmp_path / 'o'}", "--device=gpu", "--size=full"])
    assert budget.measure(options) == 0
    stage2 = [command for command in commands if "stage2" in command]
    assert len(stage2) == 3 and all(f"--rows={rows}" in command for command in stage2)
    assert all("--dtype=bfloat16" in command for command in commands)
    assert f"joint, stage2: {rows} x 2048 tokens" in read(tmp_path / "o")["rows"]
    assert read(tmp_path / "o")["environment"]["memory_gib"] == pytest.approx(mib / 1024)


def example() -> dict:
    """Returns results as a run leaves them; the figures are made up."""

    def cell(seconds: float, **more) -> dict:
        return {"seconds": seconds, "repetitions": [seconds], "errors": {}, "differs": {}} | more

    return {
        "environment": {
            "command": "python -m benchmarks.beside_torch --budget=500",
            "dtype": "bfloat16",
            "device": "Some GPU",
            "peak_flops": 1e15,
            "peak_bandwidth": 4e12,
            "versions": dict.fromkeys(summary.PACKAGES, "1.0"),
        },
        "rows": {
            "joint, stage1": {
                "flops": 2.5e14,
                "columns": {
                    "ours": cell(0.5, peak_gib=40.04),
                    "eager": cell(0.75, micro_batches=2),
                    "compiled": cell(0.6),
                },
            },
            "decode, 1 row": {
                "bytes": 2e12,
                "columns": {
                    "ours": cell(1.25),
                    "eager": {"not_measured": "no time left"},
                    "compiled": cell(1.0),
                },
            },
            "attention, llama": {
                "columns": {"xla": cell(0.00868), "cudnn": cell(0.0026), "eager": cell(0.003)},
            },
        },
    }


def test_the_table_and_the_chart(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(json.dumps(example()))
    assert summary.write(tmp_path)
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| Some GPU | ours | PyTorch | PyTorch, compiled | ratio | of the hardware |",
        "|---|---|---|---|---|---|",
        "| joint, stage1 | 500 ms, 40.0 GiB | 750 ms, 2 micro-batches | 600 ms | 1.20 | 50.0 % MFU |",
        "| decode, 1 row | 1.25 s | not measured | 1.00 s | 0.80 | 40.0 % of the bandwidth |",
        "",
        "| Some GPU | XLA | cuDNN | PyTorch |",
        "|---|---|---|---|",
        "| attention, llama | 8.68 ms | 2.6 ms | 3 ms |",
        "",
        "- Not measured: decode, 1 row, eager: no time left.",
        "",
        "`python -m benchmarks.beside_torch --budget=500`: bfloat16, jax 1.0, torch 1.0, transformers 1.0, "
        "diffusers 1.0.",
    ]
    from PIL import Image

    with Image.open(tmp_path / "chart.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 3
    with pytest.raises(ValueError, match="has no results.json; give the folder of a run with --budget"):
        summary.write(tmp_path / "none")
    document = tmp_path / "page.md"
    document.write_text("<!-- beside torch, gpu -->\nold\n<!-- /beside torch, gpu -->\n")
    monkeypatch.setattr(sys, "argv", ["x", f"--report={tmp_path}", f"--document={document}"])
    assert main() == 0
    assert document.read_text().splitlines()[1:-1] == (tmp_path / "table.md").read_text().splitlines()


@pytest.mark.parity
@pytest.mark.parametrize("name", jobs.NAMES[1:])  # stage I is stage II with fewer gradients
def test_both_sides_have_the_rows_of_the_plan_and_agree(name):
    pytest.importorskip("torch")
    from benchmarks.beside_torch import rows
    from benchmarks.beside_torch.agreement import errors_between, exceeding

    found = {}
    for side in ("ours", "eager"):
        # PyTorch's micro-batches add up to our whole batch.
        one = rows.Side(side, "smallest", "cpu", "float32", micro_batches=2 if side == "eager" else 1)
        planned = jobs.plan((name,), (side,), one.size, "cpu")[0]
        for row in rows.JOBS[name](one):
            assert row.error is None and row.work.seconds() > 0
            found[row.name, row.column] = row
        assert tuple(cell for cell in found if cell in planned.cells) == planned.cells
    for (row, column), theirs in found.items():
        if column == "eager":
            ours = next(x for (other, c), x in found.items() if other == row and c in ("ours", "xla"))
            errors = errors_between(ours.result, theirs.result)
            assert errors and not exceeding(errors, "float32"), row
            assert name == "kernels" or min(ours.bound().values()) > 0
            assert theirs.figures() == ({"micro_batches": 2} if name == "stage2" else {})
    assert len(found) > 1


@pytest.mark.parity
def test_weights_drawn_on_the_device_are_the_same_on_both_sides():
    torch = pytest.importorskip("torch")
    from benchmarks.beside_torch.inputs import Inputs
    from benchmarks.beside_torch.towers import TorchSettings, Towers

    size = make_size("smallest", "bfloat16")
    inputs = Inputs(size, on_device=True)
    ours = inputs.weights(lambda path: "float32" if path.startswith("llama") else "bfloat16")
    assert ours["llama/norm/scale"].dtype == "float32" and ours["unet/conv_in/bias"].dtype == "bfloat16"
    towers = Towers(inputs, TorchSettings("cpu", compiled=False), trained=("llama",))
    assert "params" not in vars(inputs)  # nothing was drawn on the host
    head = towers.llama.lm_head.weight
    assert head.dtype == torch.bfloat16
    ours_head = np.asarray(ours["llama/lm_head/kernel"]).T
    np.testing.assert_array_equal(towers.masters["llama.lm_head.weight"].numpy(), ours_head)
    assert 0.9 < np.std(ours_head) * ours_head.shape[1] ** 0.5 < 1.1
    np.testing.assert_array_equal(
        head.detach().float().numpy(), ours_head.astype("bfloat16").astype(np.float32)
    )
