"""Converts weights between PyTorch's forms and ours.

    python tools/convert_weights.py inspect SRC
    python tools/convert_weights.py to-jax SRC DST [--dtype bfloat16] [--parts FOLDER]
    python tools/convert_weights.py to-jax DST --llm A [--vision B] [--diffusion C]
    python tools/convert_weights.py to-torch SRC DST [--dtype float32]

SRC of to-jax and inspect is recognized: a DreamLLM, LLaMA / Vicuna, LLaVA-1.5, CLIP or diffusers Stable
Diffusion folder, or a Stable Diffusion in one .safetensors file. Tensors are streamed, so that a model may be
larger than memory. PyTorch is needed only where to-torch writes a whole DreamLLM: its plugins' files are
written from memory, one at a time. With --llm the towers of several sources become one model, where stage I
begins: control tokens join the vocabulary, connectors are drawn.
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
        command.add_argument("source", metavar="SRC", type=Path, nargs="?" if name == "to-jax" else None)
        if name == "to-jax":
            for tower, what in (
                ("llm", "a language model (with its connectors, where its towers stay)"),
                ("vision", "a vision tower: CLIP, or a model that has one"),
                ("diffusion", "a U-Net and VAE: Stable Diffusion, or a model that has them"),
            ):
                command.add_argument(f"--{tower}", type=Path, metavar="SRC", help=f"take {what} from here")
        if name != "to-torch":
            command.add_argument(
                "--prediction-type",
                choices=("epsilon", "v_prediction"),
                help="what a Stable Diffusion 2 in one file predicts",
            )
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
    from dreamllm_jax.convert.folders import convert_to_jax, convert_to_torch
    from dreamllm_jax.convert.inspect import describe

    if options.command == "inspect":
        print(describe(options.source, options.parts, options.prediction_type))
        return
    settings = {
        "dtype": options.dtype,
        "shard_bytes": int(options.shard_gb * 1e9),
        "overwrite": options.overwrite,
        "progress": not options.quiet,
    }
    if options.command == "to-jax":
        source = chosen_source(options)
        report = convert_to_jax(source, options.target, **settings)
        print(f"{source.path} ({source.kind}) is now {options.target}\n{report}")
    else:
        convert_to_torch(options.source, options.target, **settings)
        print(f"{options.source} is now {options.target}, in PyTorch's forms")


def chosen_source(options: argparse.Namespace):
    """SRC, or what the towers named one by one make together.

    Raises:
      ValueError: both of these or neither, towers without --llm.
    """
    from dreamllm_jax.convert.compose import compose
    from dreamllm_jax.convert.recognize import open_checkpoint

    named = {name: getattr(options, name) for name in ("llm", "vision", "diffusion")}
    named = {name: path for name, path in named.items() if path is not None}
    if (options.source is not None) == bool(named):
        raise ValueError("give either SRC or the towers by --llm, --vision and --diffusion.")
    if options.source is not None:
        return open_checkpoint(options.source, options.parts, options.prediction_type)
    if "llm" not in named:
        raise ValueError("--vision and --diffusion join a language model: name it with --llm.")
    prediction = options.prediction_type
    return compose(**{name: open_checkpoint(path, options.parts, prediction) for name, path in named.items()})


if __name__ == "__main__":
    sys.exit(main())
