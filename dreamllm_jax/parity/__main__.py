"""`python -m dreamllm_jax.parity FOLDER`: compares our numbers with those that the reference computed.

FOLDER is laid out as `tests/golden/dreamllm-a`: a checkpoint, the configs of its towers, and
`reference.safetensors` with one training step and two generations of the reference. With
`SEQUENCES.json --tokenizer FOLDER` token ids and labels are compared instead. The output is one JSON object
{quantity: error}. The exit code is 1 if an error exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dreamllm_jax.parity.errors import exceeding
from dreamllm_jax.parity.folder import BOUNDS, compare_folder
from dreamllm_jax.parity.sequences import compare_sequences


def main(arguments: list[str] | None = None) -> int:
    """Prints the errors. Returns 1 if one exceeds its bound or the input is wrong, else 0."""
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
                raise ValueError(
                    f"{options.path} holds sequences; name the folder of their tokenizer: --tokenizer."
                )
            errors = compare_sequences(options.path, options.tokenizer)
        else:
            errors = compare_folder(options.path)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(errors, indent=1))
    found = exceeding(errors, BOUNDS)
    for name, error in found.items():
        print(f"{name} is off by {error:.3g}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
