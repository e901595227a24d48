"""Converts weights between PyTorch's forms and ours.

    python tools/convert_weights.py inspect SRC
    python tools/convert_weights.py to-jax SRC DST [--dtype bfloat16] [--parts FOLDER]
    python tools/convert_weights.py to-torch SRC DST [--dtype float32]

SRC of to-jax and inspect is recognized: a DreamLLM, LLaMA / Vicuna, LLaVA-1.5, CLIP or diffusers Stable
Diffusion folder. torch is not needed, nor memory for the whole model.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Conversion computes nothing: keep JAX (which only derives shapes) off the accelerators.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 1 and a sentence on standard error where the input is at fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("inspect", "say what SRC is, and what would not fit"),
        ("to-jax", "write SRC as a folder that DreamLLM.from_pretrained loads"),
        ("to-torch", "write a converted SRC as folders that transformers, diffusers and the reference load"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("source", metavar="SRC", type=Path)
        if name != "to-torch":
            command.add_argument("--parts", type=Path, help="folder of the towers that SRC only names")
        if name != "inspect":
            command.add_argument("target", metavar="DST", type=Path)
            command.add_argument(
                "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are"
            )
            command.add_argument(
                "--shard-gb", type=float, default=5.0, help="largest file, in GB (default 5)"
            )
            command.add_argument("--overwrite", action="store_true", help="replace an existing DST")
            command.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    from dreamllm_jax.convert.convert import convert_to_jax, convert_to_torch
    from dreamllm_jax.convert.inspect import describe
    from dreamllm_jax.convert.sources import open_source

    if options.command == "inspect":
        print(describe(options.source, options.parts))
        return
    settings = {
        "dtype": options.dtype,
        "shard_bytes": int(options.shard_gb * 1e9),
        "overwrite": options.overwrite,
        "progress": not options.quiet,
    }
    if options.command == "to-jax":
        source = open_source(options.source, options.parts)
        report = convert_to_jax(source, options.target, **settings)
        print(f"{options.source} ({source.kind}) is now {options.target}\n{report}")
    else:
        convert_to_torch(options.source, options.target, **settings)
        print(f"{options.source} is now {options.target}, in PyTorch's forms")


if __name__ == "__main__":
    sys.exit(main())
