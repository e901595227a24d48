"""Converts weights between PyTorch's formats and ours, as `dreamllm inspect` and `dreamllm convert` do.

python tools/convert_weights.py inspect SRC
python tools/convert_weights.py to-jax SRC DST [--dtype bfloat16] [--parts FOLDER]
python tools/convert_weights.py to-jax DST --llm A [--vision B] [--diffusion C]
python tools/convert_weights.py to-torch SRC DST [--dtype float32]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dreamllm_jax.commands import convert, inspect  # noqa: E402
from dreamllm_jax.commands.command import CommandGroup, end, make_parser, run_command  # noqa: E402

CONVERT_WEIGHTS = CommandGroup(
    name="convert_weights",
    summary="",
    description="Converts weights between PyTorch's formats and ours; says what weights hold.",
    commands=(inspect.COMMAND, *convert.COMMAND.commands),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    return run_command(make_parser(CONVERT_WEIGHTS, "python tools/convert_weights.py"), arguments)


if __name__ == "__main__":
    end(main())
