"""`report.html`: one self-contained page of what a trained model writes, how well, and how it came about."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dreamllm_jax.document import image_html
from examples.handwriting.digits import Digits
from examples.handwriting.judge import Comprehension, Creation, Written
from examples.handwriting.plots import line_chart
from examples.handwriting.words import QUESTION, WORDS, caption

Curves = Sequence[Mapping[str, float | int]]
REAL_PER_DIGIT, MISTAKES_SHOWN, ANSWERS_SHOWN = 20, 40, 2
SCALE, SMALL_SCALE = 3, 2
# What is drawn of a stage's records, besides every loss.
SHARES = ("token_accuracy", "matched")

STYLE = """
:root { color-scheme: light dark; --ink: #1d2230; --soft: #667085; --line: #d9dee8; --page: #fff;
  --card: #f6f8fb; --good: #14784a; --bad: #b42318; --curve: #2f6bd8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #343b4a;
  --page: #14171d; --card: #1d222b; --good: #57c991; --bad: #ff8a7a; --curve: #7aa7ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1010px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.4rem; } h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
p.note, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.short { white-space: nowrap; } .good { color: var(--good); } .bad { color: var(--bad); }
.card { background: var(--card); border-radius: 8px; padding: .6rem .9rem; }
.cards { display: grid; gap: .6rem; }
.next.cards { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.written { display: flex; flex-wrap: wrap; align-items: center; gap: .45rem; margin-top: .35rem; }
.picture { display: inline-block; line-height: 0; border: 2px solid transparent; border-radius: 4px; }
.picture.misread { border-color: var(--bad); } .picture img { border-radius: 2px; }
.verdict { font-size: .85rem; margin-left: auto; }
.row { display: flex; align-items: center; margin: .15rem 0 .5rem; }
.row .label { width: 4.5rem; flex: none; color: var(--soft); font-size: .85rem; }
.answers { display: flex; flex-wrap: wrap; gap: .7rem; } .answers figure { margin: 0; text-align: center; }
figcaption { font-size: .8rem; } .charts { display: flex; flex-wrap: wrap; gap: 1rem; }
svg.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg.chart text.title, svg.chart text.last { fill: var(--ink); font-weight: 600; }
svg.chart .grid { stroke: var(--line); stroke-width: 1; }
svg.chart polyline { fill: none; stroke: var(--curve); stroke-linejoin: round; }
svg.chart .raw { stroke-width: 1; opacity: .3; } svg.chart .smooth { stroke-width: 2; }
"""

LABELS = {
    "creation_accuracy": "Creation: drawn digits that are right",
    "creation_diversity": "Creation: how much drawings of a digit differ (real ones: 1), mean over digits",
    "creation_diversity_min": "The same, of the least diverse digit",
    "creation_novelty": "Creation: distance to the nearest training picture (unseen real ones: 1)",
    "creation_copied": "Creation: drawings that repeat a training picture",
    "comprehension_accuracy": "Comprehension: digits recognized",
    "document_accuracy": "Documents: unseen counts and sums, every word and picture right",
    "document_accuracy_count": "&emsp;of them counts",
    "document_accuracy_sum": "&emsp;of them sums",
    "document_accuracy_next": "Documents: what comes after an unseen picture",
    "judge_accuracy": "The judge itself, on unseen real digits",
    "seconds_total": "Seconds of training and evaluation",
    "peak_rss_gib": "Peak memory, GiB",
}


class Results(NamedTuple):
    """Everything the page shows; `metrics` is what `metrics.json` holds."""

    metrics: Mapping[str, Any]
    creation: Creation
    comprehension: Comprehension
    written: Sequence[Written]
    training: Digits
    curves: Mapping[str, Curves]


def page(results: Results) -> str:
    """The whole page."""
    metrics = results.metrics
    sections = (
        _scores(metrics),
        _documents(results.written),
        _creation(results.creation, results.training),
        _comprehension(results.comprehension),
        _curves(results.curves),
        _stages(metrics["stages"]),
        _settings(metrics),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>What a small DreamLLM wrote</title><style>{STYLE}</style></head><body>"
        "<h1>What a small DreamLLM wrote</h1>"
        f'<p class="note">Trained through {len(metrics["stages"]) - 1} stages of the recipe '
        f"{html.escape(metrics['recipe'])!r} on scikit-learn's handwritten digits, in "
        f"{metrics['seconds_training'] / 60:.1f} minutes. The counts, the sums and the pictures that it is "
        "asked about below never occurred in training.</p>"
        f"{''.join(sections)}</body></html>\n"
    )


def _scores(metrics: Mapping[str, Any]) -> str:
    rows = []
    for name, label in LABELS.items():
        target, verdict = "", ""
        if name in metrics["targets"]:
            wanted = metrics["targets"][name]
            target = f"{'at least' if 'least' in wanted else 'at most'} {next(iter(wanted.values())):g}"
            verdict = _verdict(metrics["reached"][name], "reached", "missed")
        rows.append(
            f'<tr><td>{label}</td><td class="number"><b>{_number(metrics[name])}</b></td>'
            f'<td class="short">{target}</td>'
            f'<td class="short">{verdict}</td>'
            f'<td class="soft">{html.escape(metrics["measured_on"][name])}</td></tr>'
        )
    head = (
        '<tr><th>Measure</th><th class="number">Score</th><th>Target</th><th></th><th>Measured on</th></tr>'
    )
    return f'<h2>Scores</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _documents(written: Sequence[Written]) -> str:
    out = [
        "<h2>Documents</h2><p class='note'>A prompt, and what the model wrote and drew: it decides itself "
        "when to draw, and sees its own drawings. A frame marks a picture that the judge reads as another "
        "digit.</p>"
    ]
    titles = {"count": "Unseen counts", "sum": "Unseen sums", "next": "Continuing an unseen picture"}
    for kind, title in titles.items():
        chosen = [w for w in written if w.case.kind == kind]
        right = sum(w.right for w in chosen)
        out.append(f"<h3>{title}: {right} of {len(chosen)} right</h3>")
        cards = (_case(list(group)) for _, group in groupby(chosen, key=lambda w: id(w.case)))
        out.append(f'<div class="{kind} cards">{"".join(cards)}</div>')
    return "".join(out)


def _case(group: Sequence[Written]) -> str:
    """One prompt with its documents."""
    case = group[0].case
    prompt = [case.prompt] if isinstance(case.prompt, str) else case.prompt
    shown = " ".join(html.escape(p) if isinstance(p, str) else _picture(p) for p in prompt)
    expected = " ".join(f"[{WORDS[p]}]" if isinstance(p, int) else p for p in case.expected)
    hint = (
        f'<div class="soft">expected, pictures in brackets: {expected}</div>'
        if not all(w.right for w in group)
        else ""
    )
    return f'<div class="card"><b>{shown}</b>{"".join(map(_writing, group))}{hint}</div>'


def _writing(written: Written) -> str:
    parts = []
    for i, (part, judged) in enumerate(zip(written.document, written.judged, strict=True)):
        if isinstance(part, str):
            parts.append(f"<span>{html.escape(part)}</span>")
            continue
        wanted = written.case.expected[i] if i < len(written.case.expected) else None
        misread = judged != wanted
        title = f"judged {WORDS[judged]}" if isinstance(judged, int) else ""
        parts.append(_picture(part, misread, title))
    if written.document.finish_reason != "stop":
        parts.append('<span class="soft">(no end)</span>')
    verdict = f'<span class="verdict">{_verdict(written.right, "right", "wrong")}</span>'
    return f'<div class="written">{" ".join(parts)}{verdict}</div>'


def _creation(creation: Creation, training: Digits) -> str:
    out = [
        "<h2>Drawings</h2><p class='note'>From the captions alone, beside real training pictures. "
        "A frame marks a drawing that the judge reads as another digit.</p>"
    ]
    for digit in range(10):
        real = training.images[training.labels == digit][:REAL_PER_DIGIT]
        drawn = (
            _picture(Image.fromarray(picture), bool(judged != digit), f"judged {WORDS[judged]}", SMALL_SCALE)
            for picture, judged in zip(creation.pictures[digit], creation.judged[digit], strict=True)
        )
        right = creation.right[digit]
        out.append(f"<h3>{caption(digit)}: {right.sum()} of {len(right)} right</h3>")
        out.append(_row("real", (_picture(Image.fromarray(p), scale=SMALL_SCALE) for p in real)))
        out.append(_row("drawn", drawn))
    return "".join(out)


def _row(label: str, pictures: Iterable[str]) -> str:
    return f'<div class="row"><span class="label">{label}</span><span>{"".join(pictures)}</span></div>'


def _comprehension(comprehension: Comprehension) -> str:
    right, labels = comprehension.right, comprehension.digits.labels
    mistakes = np.flatnonzero(~right).tolist()
    by_digit = [np.flatnonzero(right & (labels == digit)).tolist() for digit in range(10)]
    examples = [i for indices in by_digit for i in indices[:ANSWERS_SHOWN]]
    more = f" (the first {MISTAKES_SHOWN})" if len(mistakes) > MISTAKES_SHOWN else ""
    return (
        f"<h2>{QUESTION}</h2><p class='note'>Asked about all {len(labels)} unseen pictures: "
        f"{int(right.sum())} answers are right.</p>"
        f"<h3>Some right answers</h3>{_answers(comprehension, examples)}"
        f"<h3>Mistakes: {len(mistakes)}{more}</h3>{_answers(comprehension, mistakes[:MISTAKES_SHOWN])}"
    )


def _answers(comprehension: Comprehension, chosen: Iterable[int]) -> str:
    figures = []
    for i in chosen:
        answer = html.escape(comprehension.answers[i]) or "(nothing)"
        wanted = WORDS[comprehension.digits.labels[i]]
        said = answer if comprehension.right[i] else f'<span class="bad">{answer}</span><br>it is {wanted}'
        picture = image_html(Image.fromarray(comprehension.digits.images[i]), SCALE)
        figures.append(f"<figure>{picture}<figcaption>{said}</figcaption></figure>")
    return f'<div class="answers">{"".join(figures) or "none"}</div>'


def _curves(curves: Mapping[str, Curves]) -> str:
    out = ["<h2>Curves of every stage</h2><p class='note'>With the last value of the moving average.</p>"]
    for stage, records in curves.items():
        names = sorted({k for r in records for k in r if k.startswith("loss") or k in SHARES})
        charts = []
        for name in names:
            chosen = [r for r in records if name in r]
            steps, values = [r["step"] for r in chosen], [r[name] for r in chosen]
            charts.append(line_chart(name, steps, values, may_be_logarithmic=name not in SHARES))
        out.append(
            f'<h3>{html.escape(stage)}</h3><div class="charts">{"".join(charts) or "no records"}</div>'
        )
    return "".join(out)


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(s["name"])}</td><td class="number">{s["steps"] or ""}</td>'
        f'<td class="number">{s["seconds"]:.0f}</td><td class="number">{s["peak_rss_gib"]:.2f}</td></tr>'
        for s in stages
    )
    head = "".join(f'<th class="number">{name}</th>' for name in ("Steps", "Seconds", "Peak memory, GiB"))
    return f"<h2>Time and memory</h2><table><tr><th>Stage</th>{head}</tr>{rows}</table>"


def _settings(metrics: Mapping[str, Any]) -> str:
    def listed(values: Mapping[str, Any]) -> str:
        return html.escape(", ".join(f"{k} {v}" for k, v in values.items() if v is not None))

    return (
        f"<h2>How</h2><p>Machine: {listed(metrics['machine'])}.<br>"
        f"Generation: {listed(metrics['generation'])}.<br>Seed of the training: {metrics['seed']}.</p>"
    )


def _picture(image: Image.Image, misread: bool = False, title: str = "", scale: int = SCALE) -> str:
    tip = f' title="{html.escape(title)}"' if title else ""
    return f'<span class="picture{" misread" if misread else ""}"{tip}>{image_html(image, scale)}</span>'


def _verdict(good: bool, yes: str, no: str) -> str:
    return f'<span class="good">✓ {yes}</span>' if good else f'<span class="bad">✗ {no}</span>'


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
