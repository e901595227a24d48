"""Defines and runs a subcommand: parsing, errors and exit codes, the same for all of them."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

OK, FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 130
PREEMPTED = 128 + signal.SIGTERM
# Where Linux shows GPUs (the second of them under WSL, the third AMD's) and TPUs.
ACCELERATORS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")

EXIT_CODES = f"""exit codes:
  {OK}    the command did what was asked
  {FAILED}    it failed: a file cannot be written, a program does not fit, a bound is missed
  {BAD_REQUEST}    the request is wrong: an unknown option, an impossible value, a folder without a model
  {INTERRUPTED}  it was interrupted (Ctrl-C)
  {PREEMPTED}  a SIGTERM ended a training run; its state is saved, and the same command resumes it"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    `examples` are arguments, as they follow the command's name. `run` gets the parsed options and returns an
    exit code; it may raise any error that `exit_code` knows. A command with `overrides` also takes
    `--config.KEY=VALUE`; `run` finds them, unparsed, in `options.overrides`.
    """

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    overrides: bool = False


@dataclasses.dataclass(frozen=True)
class CommandGroup:
    """A command that consists of subcommands; its first argument selects one."""

    name: str
    summary: str
    description: str
    commands: tuple[Command | CommandGroup, ...]


class Failed(Exception):
    """The request was valid, and the command failed; the message is the sentence to print."""


def exit_code(run: Callable[[], int]) -> int:
    """Runs a command; an error becomes one sentence on standard error and its exit code (`EXIT_CODES`).

    Any other error is a defect of this package, and is raised.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_REQUEST if isinstance(error, ValueError) else FAILED
    except Exception as error:
        from dreamllm_jax import distributed

        if not isinstance(error, distributed.Preempted):
            raise
        distributed.print_on_main(error)
        return PREEMPTED


def end(code: int) -> NoReturn:
    """Ends this process with an exit code. A failure also leaves the other processes."""
    if code != OK and "dreamllm_jax.distributed" in sys.modules:
        from dreamllm_jax import distributed

        distributed.exit_process(code)
    sys.exit(code)


def make_parser(command: Command | CommandGroup, prog: str) -> argparse.ArgumentParser:
    """Returns the parser of a command, or of a group with all of its commands; users call it `prog`."""
    parser = argparse.ArgumentParser(prog=prog, **_help_text(command, prog))
    _add_command(parser, command, prog)
    return parser


def _add_command(parser: argparse.ArgumentParser, command: Command | CommandGroup, prog: str) -> None:
    if isinstance(command, Command):
        command.add_arguments(parser)
        parser.set_defaults(command=command, parser=parser)
        return
    choices = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", title="commands")
    for one in command.commands:
        name = f"{prog} {one.name}"
        _add_command(choices.add_parser(one.name, help=one.summary, **_help_text(one, name)), one, name)


def _help_text(command: Command | CommandGroup, prog: str) -> dict[str, Any]:
    """Returns the keyword arguments of an `ArgumentParser` that make its `--help`."""
    epilog = "\n".join(["examples:", *(f"  {prog} {example}" for example in _examples(command))])
    if isinstance(command, CommandGroup):
        epilog += f"\n\n`{prog} COMMAND --help` shows all options and examples of a command."
    return {
        "description": command.description,
        "epilog": f"{epilog}\n\n{EXIT_CODES}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _examples(command: Command | CommandGroup) -> list[str]:
    """Returns the examples of a command; of a group, the first example of each of its commands."""
    if isinstance(command, Command):
        return list(command.examples)
    return [f"{one.name} {example}" for one in command.commands for example in _examples(one)[:1]]


def expect_accelerators() -> None:
    """Lets JAX use the CPU if this machine has no accelerator and `JAX_PLATFORMS` is not set.

    Otherwise the compilers of TPUs and GPUs, where they are installed for `dreamllm compile`, would complain
    that they find none. launch/python.sh does the same for scripts.
    """
    if os.environ.get("JAX_PLATFORMS") or sys.platform != "linux":
        return
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parses arguments (default: the process's) and runs the command they choose; returns its exit code."""
    options, others = parser.parse_known_args(arguments)
    expect_accelerators()
    command: Command = options.command
    if others and not command.overrides:
        options.parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.overrides = others
    return exit_code(lambda: command.run(options))
