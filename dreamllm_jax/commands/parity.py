"""`dreamllm parity`: compares our numbers with those that the reference computed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dreamllm_jax.commands.command import FAILED, OK, Command
from dreamllm_jax.commands.completion import FOLDERS, completes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    completes(add("path", metavar="FOLDER", type=Path, help="the folder, or a file of sequences"), FOLDERS)
    completes(add("--tokenizer", type=Path, help="folder of the tokenizer that made the sequences"), FOLDERS)


def run(options: argparse.Namespace) -> int:
    from dreamllm_jax.parity.errors import exceeding
    from dreamllm_jax.parity.folder import BOUNDS, compare_folder
    from dreamllm_jax.parity.sequences import compare_sequences

    if options.path.suffix == ".json":
        if options.tokenizer is None:
            raise ValueError(
                f"{options.path} holds sequences; name the folder of their tokenizer: --tokenizer."
            )
        errors = compare_sequences(options.path, options.tokenizer)
    else:
        errors = compare_folder(options.path)
    print(json.dumps(errors, indent=1))
    beyond = exceeding(errors, BOUNDS)
    for name, error in beyond.items():
        print(f"{name}: error {error:.3g} exceeds its bound", file=sys.stderr)
    return FAILED if beyond else OK


COMMAND = Command(
    name="parity",
    summary="compare our numbers with those that the reference computed",
    description="Compares our numbers with those that the reference computed; prints {quantity: error} as\n"
    "JSON. FOLDER is laid out as tests/golden/dreamllm-a: a checkpoint, the configs of its\n"
    "towers, and reference.safetensors with one training step and two generations of the\n"
    "reference. FOLDER can also be a .json file of token ids and labels. An error beyond its\n"
    "bound is exit code 1.",
    examples=(
        "tests/golden/dreamllm-a",
        "tests/golden/sequences.json --tokenizer tests/golden/dreamllm-a/checkpoint",
    ),
    add_arguments=add_arguments,
    run=run,
)
