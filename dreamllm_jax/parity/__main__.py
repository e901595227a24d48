"""`python -m dreamllm_jax.parity FOLDER`: our numbers beside those that the reference computed.

FOLDER is laid out as `tests/golden/dreamllm-a`: a checkpoint, the configs of its towers, and
`reference.safetensors`, one training step and two generations of the reference. Or, with
`SEQUENCES.json --tokenizer FOLDER`: ids and labels. Prints one JSON object {quantity: measured error}; the
exit code is 1 where one misses its bound.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from dreamllm_jax.parity.case import open_case
from dreamllm_jax.parity.generation import compare_greedy, compare_picture
from dreamllm_jax.parity.sequences import compare_sequences
from dreamllm_jax.parity.step import compare_step

# Largest errors allowed, by the beginning of the quantity's name. loss: relative; out, t2i: absolute; grad:
# norm of the difference by the norm; gen: number of other tokens; tokenizer, sequences: number of rows.
BOUNDS = {"loss": 1e-5, "out": 1e-4, "grad": 1e-4, "gen": 0, "t2i": 1e-3, "tokenizer": 0, "sequences": 0}


def verify(folder: str | Path) -> dict[str, float]:
    """{quantity: error} of a folder: the training step, greedy tokens, a picture."""
    case = open_case(folder)
    errors = compare_step(case)
    if "gen.greedy_ids" in case.reference:
        errors |= compare_greedy(case)
    if "t2i.init_latents" in case.reference:
        errors |= compare_picture(case)
    return errors


def missed(errors: dict[str, float]) -> dict[str, float]:
    """The quantities beyond their bounds; what is not a number is beyond any."""
    return {name: e for name, e in errors.items() if not e <= BOUNDS[re.split(r"\W", name)[0]]}


def main(arguments: list[str] | None = None) -> int:
    """Prints the errors; 1 where one is beyond its bound, or the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m dreamllm_jax.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="FOLDER", type=Path, help="the folder, or a file of sequences")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer that made the sequences")
    options = parser.parse_args(arguments)
    try:
        if options.path.suffix == ".json":
            if options.tokenizer is None:
                raise ValueError(f"{options.path} holds sequences; name the tokenizer's folder: --tokenizer.")
            errors = compare_sequences(options.path, options.tokenizer)
        else:
            errors = verify(options.path)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(errors, indent=1))
    for name, error in missed(errors).items():
        print(f"{name} is off by {error:.3g}", file=sys.stderr)
    return 1 if missed(errors) else 0


if __name__ == "__main__":
    sys.exit(main())
