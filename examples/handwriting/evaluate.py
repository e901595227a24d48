"""Measures a trained handwriting model: `python -m examples.handwriting.evaluate --workdir=FOLDER`.

Writes `checkpoint/`, then `report.html`, then `metrics.json` into the work folder. `metrics.json` comes last
and has the model's fingerprint: a folder that has all three, with the fingerprint of its model, is done.
With `--quantize=int8` the model's weights are rounded (see `dreamllm_jax.generate.int8`), and the results are
`report-int8.html` and `metrics-int8.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from dreamllm_jax import distributed
from dreamllm_jax.atomic import write_text
from dreamllm_jax.checkpoint.model_folder import open_pretrained, write_pretrained
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.train import Recipe, build_recipe
from dreamllm_jax.generate.api import DreamLLM
from dreamllm_jax.train.hooks.loggers import read_curves
from dreamllm_jax.train.resources import ResourceMeter
from dreamllm_jax.train.run_folder import RunFolder
from examples.handwriting.config import SOURCE
from examples.handwriting.judge import (
    COPY_QUANTILE,
    Comprehension,
    Creation,
    Judge,
    Written,
    comprehend,
    create,
    creation_scores,
    document_scores,
    write,
)
from examples.handwriting.report import Results, page

# Parts of a model that only stage 0 needs; the checkpoint leaves them out.
STAGE_0_ONLY = ("text", "contrastive")

TARGETS: dict[str, dict[str, float]] = {
    "creation_accuracy": {"least": 0.95},
    "creation_diversity": {"least": 0.6},
    "comprehension_accuracy": {"least": 0.95},
    "document_accuracy": {"least": 0.90},
    "judge_accuracy": {"least": 0.97},
    "seconds_total": {"most": 12 * 60},
    "peak_rss_gib": {"most": 4.0},
}


def main() -> None:
    """Evaluates the work folder of the command line, and prints the scores and where the report is.

    The exit code is 2 where the folder cannot be evaluated, 1 where writing fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.handwriting.evaluate", description="Measures a trained handwriting model."
    )
    parser.add_argument("--workdir", required=True, help="work folder of a finished training run")
    parser.add_argument("--quantize", choices=("int8",), help="round the language model's weights")
    arguments = parser.parse_args()
    workdir, quantize = Path(arguments.workdir), arguments.quantize
    try:
        distributed.initialize()
        if not distributed.is_main():  # one process measures, the others wait for it
            distributed.barrier("evaluated")
            return
        new = evaluate(workdir, quantize)
        distributed.barrier("evaluated")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(1)
    report, metrics = result_files(workdir, quantize)
    print(summary(metrics))
    print(f"{'evaluated' if new else 'evaluated before, nothing to do'}: {report}")


def result_files(workdir: Path, quantize: str | None = None) -> tuple[Path, Path]:
    """Returns where the report and the metrics of a work folder are."""
    kind = "" if quantize is None else f"-{quantize}"
    return workdir / f"report{kind}.html", workdir / f"metrics{kind}.json"


def evaluate(workdir: Path, quantize: str | None = None) -> bool:
    """Evaluates the model of the last stage; returns False if that was done before.

    Raises:
      ValueError: the folder is not a work folder, is not trained to the end, or is of another recipe.
    """
    recipe = read_recipe(workdir)
    model_folder = finished_model(workdir, recipe)
    fingerprint = fingerprint_of(model_folder)
    if is_done(workdir, fingerprint, quantize):
        return False
    meter = ResourceMeter()
    export(model_folder, workdir / "checkpoint")
    model = DreamLLM.from_pretrained(workdir / "checkpoint", quantize=quantize)
    _check_abilities(model, recipe)
    judge = Judge(model.config.image_size)
    with tqdm(total=3, desc="drawing digits", unit="part") as bar:
        creation = create(model, judge)
        _advance(bar, "recognizing digits")
        comprehension = comprehend(model, judge.held_out)
        _advance(bar, "writing documents")
        written = write(model, judge)
        _advance(bar, "evaluated")
    metrics = _scores(judge, creation, comprehension, written)
    metrics |= _circumstances(workdir, recipe, meter, model) | {"fingerprint": fingerprint}
    metrics |= _verdicts(metrics)
    curves = {s.name: list(read_curves(RunFolder(workdir, recipe).stage(s).logs)) for s in recipe.stages}
    results = Results(metrics, creation, comprehension, written, judge.training, curves)
    report, numbers = result_files(workdir, quantize)
    write_text(report, page(results))
    write_text(numbers, json.dumps(metrics, indent=1) + "\n")
    return True


def summary(file: Path) -> str:
    """Returns the scores that have a target, one a line, from a `metrics.json`."""
    metrics = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for name, target in metrics["targets"].items():
        (bound, wanted), verdict = *target.items(), "" if metrics["reached"][name] else "   missed"
        lines.append(f"  {name:24} {metrics[name]:8.3f}   at {bound} {wanted:g}{verdict}")
    return "\n".join(lines)


def read_recipe(workdir: Path) -> Recipe:
    """Returns the recipe of a work folder.

    Raises:
      ValueError: the folder has no recipe, or its documents are not the demonstration's.
    """
    path = workdir / "recipe.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not a work folder of a training run (it has no recipe.json); train first: "
            f"python -m dreamllm_jax.train --config=examples/handwriting/config.py --workdir={workdir}"
        )
    try:
        recipe = build_recipe(json.loads(path.read_text(encoding="utf-8")), saved=True)
    except ValueError as error:  # unreadable JSON too
        raise ValueError(
            f"{path} is not a recipe ({error}); the folder is damaged or of another version."
        ) from error
    if recipe.stages[-1].data.source != SOURCE:
        raise ValueError(
            f"{workdir} holds the recipe {recipe.name!r}, which is not trained on {SOURCE}; this evaluation "
            "asks for handwritten digits only."
        )
    return recipe


def finished_model(workdir: Path, recipe: Recipe) -> Path:
    """Returns the folder of the last stage's model.

    Raises:
      ValueError: a stage is not done.
    """
    for stage in recipe.stages:
        if not RunFolder(workdir, recipe).stage(stage).is_done():
            raise ValueError(
                f"{workdir} is not trained to the end (stage {stage.name!r} is not done); run the training "
                "again with the same --workdir: it continues where it stopped."
            )
    return RunFolder(workdir, recipe).stage(recipe.stages[-1]).model


def fingerprint_of(model_folder: Path) -> str:
    """Returns a digest of the model: config, tokenizer, and the checksums of all parameters."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "params.safetensors.index.json"):
        path = model_folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def is_done(workdir: Path, fingerprint: str, quantize: str | None = None) -> bool:
    """Returns whether all three results exist, and are those of the model with this fingerprint."""
    report, metrics = result_files(workdir, quantize)
    others = (report, workdir / "checkpoint" / "config.json")
    if not metrics.is_file() or not all(path.is_file() for path in others):
        return False
    try:
        return json.loads(metrics.read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


def export(model_folder: Path, folder: Path) -> None:
    """Writes the model without the parts that only stage 0 needs."""
    loaded = open_pretrained(model_folder)
    config = dataclasses.replace(loaded.config, text=None, contrastive=False)
    params = {k: v for k, v in loaded.params.items() if k.split("/")[0] not in STAGE_0_ONLY}
    write_pretrained(folder, params, config, loaded.tokenizer, loaded.generation)


def _advance(bar: tqdm, then: str) -> None:
    bar.set_description(then)
    bar.update()


def _check_abilities(model: DreamLLM, recipe: Recipe) -> None:
    if not (model.config.sees and model.config.draws):
        raise ValueError(
            f"The model of recipe {recipe.name!r} cannot {'draw' if model.config.sees else 'see'}; this "
            "evaluation needs both a vision tower and an image decoder."
        )


def _scores(
    judge: Judge, creation: Creation, comprehension: Comprehension, written: list[Written]
) -> dict[str, Any]:
    held_out, training = len(judge.held_out), len(judge.training)
    number = creation.judged.size
    drawings = f"{number} drawings, {number // 10} of each digit"
    cases = {kind: [w for w in written if w.case.kind == kind] for kind in ("count", "sum", "next")}
    prompts = {kind: len({id(w.case) for w in chosen}) for kind, chosen in cases.items()}

    def documents(*kinds: str) -> str:
        n, p = sum(len(cases[k]) for k in kinds), sum(prompts[k] for k in kinds)
        return f"{n} documents of {p} unseen prompts"

    near = f"{drawings}, and {training} training pictures; against {held_out} held-out ones"
    measured_on = {
        "judge_accuracy": f"{held_out} held-out pictures; trained on {training} training pictures",
        "creation_accuracy": f"{drawings}, read by the judge",
        "creation_diversity": f"{drawings}; against all training pictures of the digit",
        "creation_diversity_min": f"{drawings}; against all training pictures of the digit",
        "creation_novelty": f"{near}; medians",
        "creation_copied": f"{near}; nearer than {1 - COPY_QUANTILE:.0%} of these",
        "comprehension_accuracy": f"all {held_out} held-out pictures",
        "document_accuracy": documents("count", "sum"),
        "document_accuracy_count": documents("count"),
        "document_accuracy_sum": documents("sum"),
        "document_accuracy_next": documents("next"),
    }
    scores = {"judge_accuracy": judge.accuracy, **creation_scores(creation, judge.training, judge.held_out)}
    scores |= {"comprehension_accuracy": float(comprehension.right.mean()), **document_scores(written)}
    return {**scores, "measured_on": measured_on}


def _circumstances(workdir: Path, recipe: Recipe, meter: ResourceMeter, model: DreamLLM) -> dict[str, Any]:
    """Returns seconds and memory of every stage, the machine, and the settings of generation."""
    stages = []
    for stage in recipe.stages:
        done = json.loads(RunFolder(workdir, recipe).stage(stage).done_file.read_text(encoding="utf-8"))
        stages.append({"name": stage.name, "steps": stage.steps} | {k: done[k] for k in meter.read()})
    training = sum(s["seconds"] for s in stages)
    stages.append({"name": "evaluation", "steps": None, **meter.read()})
    return {
        "seconds_total": sum(s["seconds"] for s in stages),
        "seconds_training": training,
        "seconds_evaluation": stages[-1]["seconds"],
        "peak_rss_gib": max(s["peak_rss_gib"] for s in stages),
        "stages": stages,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "generation": to_dict(model.generation),
        "machine": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
            "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
    }


def _verdicts(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the targets, whether each is reached, and what time and memory were measured on."""
    reached = {}
    for name, target in TARGETS.items():
        value = metrics[name]
        reached[name] = value >= target["least"] if "least" in target else value <= target["most"]
    where = f"{len(metrics['stages']) - 1} stages and the evaluation, on {metrics['machine']['cores']} cores"
    times = {
        "seconds_total": f"{where}; without installation and the start of Python",
        "peak_rss_gib": f"the largest of {where}",
    }
    return {"targets": TARGETS, "reached": reached, "measured_on": metrics["measured_on"] | times}


if __name__ == "__main__":
    main()
