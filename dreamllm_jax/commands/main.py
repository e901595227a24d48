"""`dreamllm`: the command that joins all others, installed with the package."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import shtab

from dreamllm_jax.commands import compile, convert, evaluate, generate, inspect, parity, train
from dreamllm_jax.commands.command import CommandGroup, end, make_parser, run_command
from dreamllm_jax.version import __version__

DREAMLLM = CommandGroup(
    name="dreamllm",
    summary="",
    description="DreamLLM in JAX: one model that reads and writes interleaved text and images.",
    commands=tuple(m.COMMAND for m in (train, generate, evaluate, convert, inspect, compile, parity)),
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    top = make_parser(DREAMLLM, "dreamllm")
    top.add_argument("--version", action="version", version=_version())
    shtab.add_argument_to(top, "--print-completion", help="print a script of completions for this shell")
    return top


def _version() -> str:
    """Returns the versions of this package, JAX and Python, for bug reports."""
    jax = importlib.metadata.version("jax")
    return f"dreamllm {__version__} (JAX {jax}, Python {platform.python_version()})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments choose; returns its exit code."""
    return run_command(parser(), arguments)


def dreamllm() -> None:
    """Runs the installed command. Like `python -m`, it finds modules in the current folder."""
    sys.path.insert(0, os.getcwd())
    end(main())
