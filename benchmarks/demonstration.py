"""Tables the scores of several runs of the demonstration, such as three seeds on two versions of JAX.

    launch/quickstart.sh runs/0 --config.seed=0      (and so on, one run at a time on an idle machine)
    python -m benchmarks.demonstration runs/* [--document=docs/getting-started.md]

Prints a Markdown table, and with --document writes it into the document too. The exit code is 1 if a run
misses a target.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.document_table import write_table

SCORES = ("document_accuracy", "creation_accuracy", "creation_diversity", "comprehension_accuracy")


def read_metrics(workdir: Path) -> dict[str, Any]:
    """Returns the metrics of a finished and evaluated run.

    Raises:
      ValueError: the folder is not one.
    """
    path = workdir / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{workdir} has no metrics.json; run launch/quickstart.sh {workdir} to its end.")
    return json.loads(path.read_text(encoding="utf-8"))


def rows(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table, sorted by JAX version and seed; the last row has the targets."""
    lines = ["| JAX | seed | documents | creation | diversity | comprehension | seconds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: (run["machine"]["jax"], run["seed"])):
        scores = " | ".join(f"{run[name]:.3f}" for name in SCORES)
        lines.append(f"| {run['machine']['jax']} | {run['seed']} | {scores} | {run['seconds_total']:.0f} |")
    targets = runs[0]["targets"]
    target = " | ".join(f"{targets[name]['least']:g}" for name in SCORES)
    return [*lines, f"| target | | {target} | {targets['seconds_total']['most']:g} |"]


def main() -> int:
    """Parses the command line, prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR")
    parser.add_argument("--document", type=Path, help="write the table into this file")
    options = parser.parse_args()
    try:
        runs = [read_metrics(workdir) for workdir in options.workdirs]
        lines = rows(runs)
        if options.document is not None:
            write_table(options.document, "demonstration", lines)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    missed = [
        f"{workdir}: {name} misses its target"
        for workdir, run in zip(options.workdirs, runs, strict=True)
        for name, reached in run["reached"].items()
        if not reached
    ]
    for sentence in missed:
        print(sentence, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
