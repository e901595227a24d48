"""Shell completion: which arguments are files or folders (`dreamllm --print-completion bash`)."""

from __future__ import annotations

import argparse

import shtab

FILES, FOLDERS = shtab.FILE, shtab.DIRECTORY


def completes(action: argparse.Action, what: object) -> None:
    """Tells the completion scripts what an argument's value is; shtab looks for an attribute `complete`."""
    vars(action)["complete"] = what
