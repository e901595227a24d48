"""Measures the error against PyTorch at the published shapes, and against DreamLLM's recorded outputs.

    python -m benchmarks.fidelity [CASE ...] [--folder=FOLDER] [--document=docs/fidelity.md]

Needs torch, diffusers, 20 GiB of memory and 11 GB of FOLDER's disk for the largest case. Prints one JSON
object {case: {quantity: error}}, and with --document writes the largest errors into its table. The exit code
is 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.document_table import write_table
from benchmarks.fidelity.cases import BOUNDS, CASES
from dreamllm_jax.parity.errors import exceeding
from dreamllm_jax.parity.folder import BOUNDS as GOLDEN_BOUNDS
from dreamllm_jax.parity.folder import compare_folder

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = {
    name: f"the reference's step, tokens and image: `tests/golden/{name}`"
    for name in ("dreamllm-a", "dreamllm-b")
}


def measure(name: str, folder: Path | None = None) -> dict[str, float]:
    """Returns the errors of one case. PyTorch and JAX run in two processes, one after the other.

    Raises:
      RuntimeError: a process failed. The message has the end of its stderr.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(dir=folder) as case_folder:
        for side in ("theirs", "ours"):
            command = [sys.executable, "-m", f"benchmarks.fidelity.{side}", name, case_folder]
            completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
            if completed.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {completed.stderr[-3000:]}")
    return json.loads(completed.stdout)


def rows(results: dict[str, dict[str, float]]) -> list[str]:
    """Returns the lines of the Markdown table: the largest error of each kind for every case."""
    lines = ["| | outputs | gradients | bfloat16 |", "|---|---|---|---|"]
    for name, errors in results.items():
        golden = name in GOLDEN
        kinds = (("out", "t2i"), ("grad",), ()) if golden else (("output",), ("gradient",), ("bfloat16",))
        largest = [[e for q, e in errors.items() if q.split(".")[0] in kind] for kind in kinds]
        cells = [f"{max(found):.1e}" if found else "" for found in largest[:2]]
        ratio = f"{max(largest[2]):.2f}" if largest[2] else ""
        description = GOLDEN[name] if golden else CASES[name].description
        lines.append(f"| {description} | {cells[0]} | {cells[1]} | {ratio} |")
    return lines


def main() -> int:
    """Parses the command line, measures, prints the results and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"{', '.join([*GOLDEN, *CASES])} (default: all)"
    )
    parser.add_argument("--folder", type=Path, help="for the models (default: a temporary one)")
    parser.add_argument("--document", type=Path, help="write the table into this file; needs all cases")
    arguments = parser.parse_args()
    chosen = arguments.cases or [*GOLDEN, *CASES]
    if unknown := [name for name in chosen if name not in {**GOLDEN, **CASES}]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if arguments.document is not None and arguments.cases:
        parser.error("--document needs all cases: name none")
    results, exceeded = {}, {}
    for name in chosen:
        if name in GOLDEN:
            errors = compare_folder(ROOT / "tests" / "golden" / name)
            exceeded[name] = exceeding(errors, GOLDEN_BOUNDS)
        else:
            errors = measure(name, arguments.folder)
            exceeded[name] = exceeding(errors, BOUNDS)
        results[name] = errors
        print(f"{name}: largest {max(errors.values()):.2e}", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    if arguments.document is not None:
        write_table(arguments.document, "fidelity", rows(results))
    for name, errors in exceeded.items():
        for quantity, error in errors.items():
            print(f"{name}: {quantity}: the error {error:.3g} exceeds its bound", file=sys.stderr)
    return 1 if any(exceeded.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
