"""Times training and generation beside PyTorch (transformers, diffusers), in one run, in turns.

    python -m benchmarks.beside_torch [joint|prefill|decode|text_to_image|documents|all ...]
        [--size=tiny|full] [--device=cpu|gpu] [--compile=auto|on|off] [--pairs=N] [--rows=N]
        [--json=FILE] [--readme=README.md]

Both sides have the same random weights and are first seen to compute the same; warm-up and compilation are
not timed; then repetitions go A B B A ..., and the ratio (PyTorch's seconds by ours: above 1 we are faster)
is the median over neighbouring repetitions, with its quartiles. On CPU everything is float32, with as many
threads on both sides; on a GPU bfloat16, and PyTorch compiles. Needs torch and diffusers; `full` is a 7B
system and needs one GPU of 141 GB. On CPU each case has a process of its own: what another has left in the
heap made drawings up to a third slower. Prints one JSON object; the exit code is 1 where the sides disagree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its part of a GPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.beside_torch.report import command_line, surroundings, write_table  # noqa: E402
from benchmarks.beside_torch.sizes import make_size  # noqa: E402
from benchmarks.beside_torch.timing import Disagreement  # noqa: E402

NAMES = ("joint", "prefill", "decode", "text_to_image", "documents")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(NAMES)}; or all")
    parser.add_argument("--size", choices=("smallest", "tiny", "full"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile")
    parser.add_argument("--pairs", type=int, default=8, help="repetitions of each side")
    parser.add_argument("--rows", type=int, help="rows of a joint step, in place of the size's")
    parser.add_argument("--json", type=Path, help="write the result into this file too")
    parser.add_argument("--readme", type=Path, help="write the table into this file; needs all cases")
    found = parser.parse_args(arguments)
    found.cases = list(NAMES) if found.cases in ([], ["all"]) else found.cases
    if unknown := [name for name in found.cases if name not in NAMES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if found.readme is not None and set(found.cases) != set(NAMES):
        parser.error("--readme needs all cases: name none")
    if found.pairs < 1:
        parser.error(f"--pairs is {found.pairs}; it must be at least 1")
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures; {"surroundings": ..., "results": {name: measurement}}."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if options.device == "cpu" else "cuda")
    if options.size == "full":  # what one side has freed the other can have
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    import jax
    import torch

    from benchmarks.beside_torch.cases import CASES, Session, free
    from benchmarks.beside_torch.inputs import Inputs
    from benchmarks.beside_torch.theirs import Place

    gpu = options.device == "gpu"
    if jax.default_backend() != options.device:
        raise ValueError(
            f"JAX computes on {jax.default_backend()}, and --device is {options.device}; install JAX for "
            "that, or take the other."
        )
    size = make_size(options.size, "bfloat16" if gpu else "float32")
    if options.rows is not None:
        size = dataclasses.replace(size, rows=options.rows)
    compiled = gpu if options.compile == "auto" else options.compile == "on"
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    place = Place("cuda" if gpu else "cpu", compiled)
    session = Session(Inputs(size), place, options.pairs)
    about, results = surroundings(options, compiled), {}
    for name in options.cases:
        for what, found in CASES[name](session).items():
            results[what] = found
            print(f"{what}: {found['ratio']:.2f} x PyTorch", file=sys.stderr, flush=True)
        free()
    return {"surroundings": about, "results": results}


def run_apart(options: argparse.Namespace) -> dict[str, Any]:
    """What `run` returns, of cases that each had a process of its own.

    Raises:
      ChildProcessError: one of them failed; it has said why.
    """
    found: dict[str, Any] = {"results": {}}
    given = {"size": options.size, "device": options.device, "compile": options.compile}
    given |= {"pairs": options.pairs} | ({} if options.rows is None else {"rows": options.rows})
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "found.json"
            command = [sys.executable, "-m", "benchmarks.beside_torch", name, f"--json={written}"]
            command += [f"--{key}={value}" for key, value in given.items()]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise ChildProcessError(f"{name} was not measured.")
            one = json.loads(written.read_text(encoding="utf-8"))
        found["results"] |= one["results"]
        found.setdefault("surroundings", one["surroundings"] | {"command": command_line()})
    return found


def main() -> int:
    """Parses the command line, measures, prints."""
    options = parse()
    apart = options.device == "cpu" and len(options.cases) > 1
    try:
        found = run_apart(options) if apart else run(options)
    except (Disagreement, ValueError, ChildProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.readme is not None:
        write_table(options.readme, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
