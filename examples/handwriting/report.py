"""Writes `report.html`: a self-contained page with a trained model's documents, scores and training curves.

The page's layout is in `templates/report.html.jinja`; this module computes its content.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from dreamllm_jax.document import image_html
from examples.handwriting.digits import Digits
from examples.handwriting.judge import Comprehension, Creation, Written
from examples.handwriting.plots import line_chart
from examples.handwriting.words import QUESTION, WORDS, Part, caption

Curves = Sequence[Mapping[str, float | int]]
REAL_PER_DIGIT, MISTAKES_SHOWN, ANSWERS_SHOWN = 20, 40, 2
SCALE, SMALL_SCALE = 3, 2
# The metrics of a stage's records that have a chart, besides every loss.
SHARES = ("token_accuracy", "matched")

LABELS = {
    "creation_accuracy": "Creation: drawn digits that are right",
    "creation_diversity": "Creation: how much drawings of a digit differ (real ones: 1), mean over digits",
    "creation_diversity_min": "The same, of the least diverse digit",
    "creation_novelty": "Creation: distance to the nearest training picture (unseen real ones: 1)",
    "creation_copied": "Creation: drawings that repeat a training picture",
    "comprehension_accuracy": "Comprehension: digits recognized",
    "document_accuracy": "Documents: unseen counts and sums, every word and picture right",
    "document_accuracy_count": "\u2003of them counts",
    "document_accuracy_sum": "\u2003of them sums",
    "document_accuracy_next": "Documents: what comes after an unseen picture",
    "judge_accuracy": "The judge itself, on unseen real digits",
    "seconds_total": "Seconds of training and evaluation",
    "peak_rss_gib": "Peak memory, GiB",
}
TITLES = {"count": "Unseen counts", "sum": "Unseen sums", "next": "Continuing an unseen picture"}


class Results(NamedTuple):
    """Everything the page shows; `metrics` is what `metrics.json` holds."""

    metrics: Mapping[str, Any]
    creation: Creation
    comprehension: Comprehension
    written: Sequence[Written]
    training: Digits
    curves: Mapping[str, Curves]


class Picture(NamedTuple):
    """A picture on the page: framed where the judge misread it, with a tooltip."""

    image: Image.Image
    misread: bool = False
    title: str = ""


def page(results: Results) -> str:
    """Returns the whole page as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = results.metrics
    return environment.get_template("report.html.jinja").render(
        image_html=image_html,
        scale=SCALE,
        small_scale=SMALL_SCALE,
        metrics=metrics,
        scores=[_score(metrics, name, label) for name, label in LABELS.items()],
        documents=[_group(results.written, kind, title) for kind, title in TITLES.items()],
        drawings=[_drawings(results.creation, results.training, digit) for digit in range(10)],
        question=QUESTION,
        comprehension=_comprehension(results.comprehension),
        curves={stage: _charts(records) for stage, records in results.curves.items()},
        machine=_listed(metrics["machine"]),
        generation=_listed(metrics["generation"]),
    )


def _score(metrics: Mapping[str, Any], name: str, label: str) -> dict[str, Any]:
    """Returns a row of the table of scores."""
    target, value = "", metrics[name]
    if name in metrics["targets"]:
        ((bound, wanted),) = metrics["targets"][name].items()
        target = f"at {bound} {wanted:g}"
    return {
        "label": label,
        "score": f"{value:.0f}" if value >= 100 else f"{value:.3f}",
        "target": target,
        "reached": metrics["reached"][name] if target else None,
        "measured_on": metrics["measured_on"][name],
    }


def _group(written: Sequence[Written], kind: str, title: str) -> dict[str, Any]:
    """Returns the documents of one kind of prompt, in a card for each prompt."""
    chosen = [w for w in written if w.case.kind == kind]
    return {
        "kind": kind,
        "title": title,
        "right": sum(w.right for w in chosen),
        "number": len(chosen),
        "cases": [_case(list(group)) for _, group in groupby(chosen, key=lambda w: id(w.case))],
    }


def _case(group: Sequence[Written]) -> dict[str, Any]:
    """Returns one prompt with its documents; what was expected, where one of them is wrong."""
    case = group[0].case
    prompt = [case.prompt] if isinstance(case.prompt, str) else case.prompt
    expected = " ".join(f"[{WORDS[p]}]" if isinstance(p, int) else p for p in case.expected)
    return {
        "prompt": [p if isinstance(p, str) else Picture(p) for p in prompt],
        "written": [
            {"parts": _parts(w), "ended": w.document.finish_reason == "stop", "right": w.right} for w in group
        ],
        "expected": "" if all(w.right for w in group) else expected,
    }


def _parts(written: Written) -> list[str | Picture]:
    """Returns the parts of a document, its pictures as the judge read them."""
    wanted = [*written.case.expected, *[None] * len(written.judged)]
    return [
        part if isinstance(part, str) else Picture(part, judged != want, _reading(judged))
        for part, judged, want in zip(written.document, written.judged, wanted, strict=False)
    ]


def _reading(judged: Part | np.integer) -> str:
    return "" if isinstance(judged, str) else f"judged {WORDS[int(judged)]}"


def _drawings(creation: Creation, training: Digits, digit: int) -> dict[str, Any]:
    """Drawings of a digit, beside real training pictures."""
    real = training.images[training.labels == digit][:REAL_PER_DIGIT]
    drawn = zip(creation.pictures[digit], creation.judged[digit], strict=True)
    return {
        "caption": caption(digit),
        "right": int(creation.right[digit].sum()),
        "number": len(creation.right[digit]),
        "real": [Picture(Image.fromarray(p)) for p in real],
        "drawn": [Picture(Image.fromarray(p), bool(read != digit), _reading(read)) for p, read in drawn],
    }


def _comprehension(comprehension: Comprehension) -> dict[str, Any]:
    """Returns some right answers of every digit, and the mistakes."""
    right, labels = comprehension.right, comprehension.digits.labels
    mistakes = np.flatnonzero(~right).tolist()
    by_digit = [np.flatnonzero(right & (labels == digit)).tolist() for digit in range(10)]
    examples = [i for indices in by_digit for i in indices[:ANSWERS_SHOWN]]
    return {
        "number": len(labels),
        "right": int(right.sum()),
        "examples": _answers(comprehension, examples),
        "mistakes": _answers(comprehension, mistakes[:MISTAKES_SHOWN]),
        "more": len(mistakes) > MISTAKES_SHOWN,
    }


def _answers(comprehension: Comprehension, chosen: Iterable[int]) -> list[dict[str, Any]]:
    digits = comprehension.digits
    return [
        {
            "image": Image.fromarray(digits.images[i]),
            "answer": comprehension.answers[i] or "(nothing)",
            "right": bool(comprehension.right[i]),
            "wanted": WORDS[digits.labels[i]],
        }
        for i in chosen
    ]


def _charts(records: Curves) -> list[dict[str, str]]:
    """Returns a chart of every loss and share in a stage's records."""
    charts = []
    for name in sorted({k for r in records for k in r if k.startswith("loss") or k in SHARES}):
        chosen = [r for r in records if name in r]
        steps, values = [r["step"] for r in chosen], [r[name] for r in chosen]
        svg = line_chart(name, steps, values, may_be_logarithmic=name not in SHARES)
        charts.append({"name": name, "svg": b64encode(svg).decode()})
    return charts


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)
