"""What int8 weights cost in accuracy: against the reference's logits, and in the demonstration's scores.

    python -m benchmarks.int8 tests/golden/dreamllm-a tests/golden/dreamllm-b --handwriting=quickstart

`--handwriting` is the work folder of a finished demonstration, evaluated with its own weights and with
`python -m examples.handwriting.evaluate --workdir=FOLDER --quantize=int8`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.document_table import write_table
from dreamllm_jax.generate.int8 import round_to_int8
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.parity.case import Case, open_case
from dreamllm_jax.parity.step import step_batch

SCORES = {
    "document_accuracy": "documents",
    "creation_accuracy": "creation",
    "comprehension_accuracy": "comprehension",
}


def logits(case: Case, params: dict) -> np.ndarray:
    """Returns the logits of the reference's training batch, at the positions of tokens [n, V]."""
    batch = jax.tree.map(jnp.asarray, step_batch(case))

    @jax.jit
    def run(params, batch):
        hidden = case.engine.module.apply({"params": params}, batch, method=DreamLLMModule.read)
        return case.engine.module.apply({"params": params}, hidden, method=DreamLLMModule.logits)

    return np.asarray(run(params, batch))[case.reference["in.attention_mask"] == 1]


def golden_row(folder: Path) -> str:
    """Returns the table's row of a folder of the reference's numbers."""
    case = open_case(folder)
    int8 = unflatten_dict(round_to_int8(flatten_dict(case.engine.params, sep="/")), sep="/")
    wanted = case.reference["out.logits"][case.reference["in.attention_mask"] == 1]
    cells = []
    for params in (case.engine.params, int8):
        found = logits(case, params)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        other = int((found.argmax(-1) != wanted.argmax(-1)).sum())
        cells.append(f"{error:.1e}, {other} of {len(wanted)}")
    measured = "relative error of the logits, tokens with another maximum"
    return f"| `{folder.name}`: {measured} | {' | '.join(cells)} |"


def handwriting_rows(workdir: Path) -> list[str]:
    """Returns the table's rows of a demonstration.

    Raises:
      ValueError: the folder was not evaluated both ways.
    """
    files = [workdir / "metrics.json", workdir / "metrics-int8.json"]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{workdir} has no {' and no '.join(absent)}; run python -m examples.handwriting.evaluate "
            f"--workdir={workdir}, and again with --quantize=int8."
        )
    scores = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [
        f"| demonstration: {name} | {' | '.join(f'{found[key]:.3f}' for found in scores)} |"
        for key, name in SCORES.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures what int8 weights cost in accuracy.")
    parser.add_argument("folders", type=Path, nargs="*", help="folders laid out as tests/golden/dreamllm-a")
    parser.add_argument("--handwriting", type=Path, help="work folder of a finished demonstration")
    parser.add_argument("--document", type=Path, help="document whose table is replaced")
    options = parser.parse_args(arguments)
    lines = ["| | weights as saved | int8 |", "|---|---|---|"]
    lines += [golden_row(folder) for folder in options.folders]
    lines += handwriting_rows(options.handwriting) if options.handwriting else []
    print("\n".join(lines))
    if options.document is not None:
        write_table(options.document, "int8", lines)


if __name__ == "__main__":
    main()
