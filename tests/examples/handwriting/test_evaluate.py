"""A finished work folder becomes metrics.json, report.html and checkpoint/; an unfinished one a sentence."""

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.train.run_folder import RunFolder
from examples.handwriting import evaluate as evaluation
from tests.folders import load_pretrained

RESULTS = ("metrics.json", "report.html", "checkpoint/config.json")


@pytest.fixture(autouse=True)
def knows_everything(monkeypatch, oracle):
    monkeypatch.setattr(evaluation, "DreamLLM", oracle)


@pytest.fixture
def evaluated(workdir):
    assert evaluation.evaluate(workdir)
    return workdir


def test_metrics(evaluated, recipe):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    held_out = 359
    assert metrics["comprehension_accuracy"] == pytest.approx(1 - 1 / held_out)
    assert metrics["creation_accuracy"] > 0.97 and metrics["creation_copied"] == 1
    assert metrics["document_accuracy"] > 0.9 and metrics["document_accuracy_next"] > 0.9
    assert metrics["judge_accuracy"] >= 0.97
    assert metrics["peak_rss_gib"] >= 1.5
    assert metrics["seconds_total"] == pytest.approx(30 + metrics["seconds_evaluation"])
    assert metrics["seconds_training"] == 30
    stages = {s["name"]: s for s in metrics["stages"]}
    assert list(stages) == ["first", "second", "evaluation"]
    assert stages["second"]["seconds"] == 20 and stages["second"]["peak_rss_gib"] == 1.5
    assert metrics["machine"]["cores"] >= 1 and metrics["machine"]["jax"]
    scores = [k for k, v in metrics.items() if isinstance(v, float) and not k.startswith("seconds_")]
    assert set(scores) <= set(metrics["measured_on"])
    assert "200 drawings" in metrics["measured_on"]["creation_accuracy"]
    assert "45 documents of 15 unseen prompts" == metrics["measured_on"]["document_accuracy"]
    assert set(metrics["reached"]) == set(metrics["targets"])
    assert metrics["reached"]["comprehension_accuracy"] is True


class Page(HTMLParser):
    """Checks that elements close in order, and collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.counts = [], [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts[tag] + 1 if tag in self.counts else 1
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts[tag] + 1 if tag in self.counts else 1


def test_the_report_stands_alone_and_shows_everything(evaluated):
    text = (evaluated / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert all(
        link.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for link in page.links
    )
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    charts = [link for link in page.links if link.startswith("data:image/svg")]
    assert len(charts) == 4  # two stages, a loss and an accuracy each
    assert page.counts["img"] >= 200 + 200 + 45 * 3
    for shown in ("Count from zero to four.", "Write two plus five.", "What comes next?", "first", "0.997"):
        assert shown in text
    assert "&lt;nothing&gt;" in text and "it is" in text  # the one wrong answer, as text


def test_the_checkpoint_is_the_model_without_what_only_stage_0_needs(evaluated, recipe):
    exported = load_pretrained(evaluated / "checkpoint")
    whole = load_pretrained(RunFolder(evaluated, recipe).stage(recipe.stages[-1]).model)
    assert exported.config == dataclasses.replace(whole.config, text=None, contrastive=False)
    assert exported.generation == whole.generation
    left_out = {k.split("/")[0] for k in whole.params.keys() - exported.params.keys()}
    assert left_out == {"text", "contrastive"}
    for path, value in exported.params.items():
        np.testing.assert_array_equal(value, whole.params[path])


def test_what_is_done_is_not_done_again(evaluated, monkeypatch, save_model, recipe):
    model_folder = RunFolder(evaluated, recipe).stage(recipe.stages[-1]).model

    def refuse(*args):
        raise AssertionError("This was done before.")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "export", refuse)
        assert not evaluation.evaluate(evaluated)
        save_model(model_folder, seed=1)  # another model: everything anew
        with pytest.raises(AssertionError, match="done before"):
            evaluation.evaluate(evaluated)
    before = (evaluated / "checkpoint" / "params.safetensors").read_bytes()
    assert evaluation.evaluate(evaluated)
    assert (evaluated / "checkpoint" / "params.safetensors").read_bytes() != before
    for name in RESULTS:
        (evaluated / name).rename(evaluated / "aside")
        assert not evaluation.is_done(evaluated, evaluation.fingerprint_of(model_folder))
        (evaluated / "aside").rename(evaluated / name)
    (evaluated / "metrics.json").write_text('{"fingerpr')
    assert not evaluation.is_done(evaluated, evaluation.fingerprint_of(model_folder))


def test_a_crash_leaves_the_checkpoint_and_nothing_half_written(workdir, monkeypatch):
    def crash(*args):
        raise RuntimeError("crash")

    monkeypatch.setattr(evaluation, "write", crash)
    with pytest.raises(RuntimeError):
        evaluation.evaluate(workdir)
    assert load_pretrained(workdir / "checkpoint").config.text is None
    assert not (workdir / "metrics.json").exists() and not (workdir / "report.html").exists()


def said(monkeypatch, capsys, workdir):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={workdir}"])
    try:
        evaluation.main()
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command(workdir, monkeypatch, capsys):
    code, out = said(monkeypatch, capsys, workdir)
    assert code == 0 and "comprehension_accuracy" in out and f"evaluated: {workdir / 'report.html'}" in out
    code, out = said(monkeypatch, capsys, workdir)
    assert code == 0 and "nothing to do" in out


def test_folders_that_cannot_be_evaluated(workdir, tmp_path, monkeypatch, capsys, recipe, change_recipe):
    def sentence(folder=workdir):
        code, complaint = said(monkeypatch, capsys, folder)
        assert code == 2 and complaint.startswith("error: ") and complaint.count("\n") == 1
        return complaint

    assert "is not a work folder of a training run" in sentence(tmp_path / "nowhere")
    RunFolder(workdir, recipe).stage(recipe.stages[1]).done_file.rename(workdir / "done.json")
    assert "stage 'second' is not done" in sentence()
    (workdir / "recipe.json").write_text("{")
    assert "is not a recipe" in sentence()
    stages = tuple(dataclasses.replace(s, data=DataConfig()) for s in recipe.stages)
    change_recipe(stages=stages)
    assert "is not trained on examples.handwriting.source" in sentence()
    change_recipe()
    (workdir / "done.json").rename(RunFolder(workdir, recipe).stage(recipe.stages[1]).done_file)
    model = RunFolder(workdir, recipe).stage(recipe.stages[1]).model
    model.rename(workdir / "lost")
    assert "does not exist" in sentence()


def test_a_model_that_cannot_draw_is_not_evaluated(workdir, recipe, oracle):
    model = oracle.from_pretrained(RunFolder(workdir, recipe).stage(recipe.stages[1]).model)
    blind = dataclasses.replace(model.config, unet=None, vae=None, text=None, contrastive=False)
    object.__setattr__(model._engine, "config", blind)
    with pytest.raises(ValueError, match="cannot draw"):
        evaluation._check_abilities(model, recipe)
