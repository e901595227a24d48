"""Times training and generation against PyTorch (transformers, diffusers), alternating in one run.

    python -m benchmarks.beside_torch [joint|prefill|decode|text_to_image|documents|all ...]
        [--size=tiny|full] [--device=cpu|gpu] [--dtype=auto|float32|bfloat16] [--compile=auto|on|off]
        [--pairs=N] [--rows=N] [--json=FILE] [--document=docs/performance.md]
    python -m benchmarks.beside_torch [joint|decode|prefill|text_to_image|kernels|all ...] --budget=SECONDS
        --out=DIR [--size=...] [--device=...] [--dtype=...] [--eager-only] [--together=N]
    python -m benchmarks.beside_torch --report=DIR [--document=docs/performance.md]

Both sides have the same random weights, and each case first checks that they compute the same result. Warm-up
and compilation are not timed. Repetitions then alternate in the order A B B A ... The reported ratio is
PyTorch's seconds divided by ours (above 1: ours is faster): the median over pairs of neighbouring
repetitions, with its quartiles.

On a CPU both sides compute in float32 with the same number of threads, and each case runs in its own process:
in a shared process, the heap that an earlier case left behind slowed image generation by up to a third. On a
GPU both sides compute in bfloat16, with float32 weights in training, and PyTorch uses `torch.compile`.
`--dtype` says otherwise.

With `--budget`, each side is measured in a process of its own, and PyTorch twice: as it is and compiled. Rows
are measured in the order of their importance: stage I, decoding and reading prompts, text to image, stage II,
attention. Each is written into DIR/results.json at once; those that no longer fit into the time are listed as
not measured. At the end, or when the process gets SIGTERM, DIR/table.md and DIR/chart.png are written;
`--report` writes them again. Several processes may compile at the same time (`--together`, by default 3 if
there are enough cores), but only one measures, while the others are stopped.

Needs torch and diffusers. `--size=full` is a 7B system: it needs one GPU, of 141 GB without `--budget`, of 80
GB with it. Prints one JSON object, or the table; the exit code is 1 if a case fails or the sides disagree.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for PyTorch
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.beside_torch import budget, summary  # noqa: E402
from benchmarks.beside_torch.budget import JOBS  # noqa: E402
from benchmarks.beside_torch.report import command_line, measurement_environment, rows  # noqa: E402
from benchmarks.beside_torch.sizes import make_size  # noqa: E402
from benchmarks.beside_torch.timing import Disagreement  # noqa: E402
from benchmarks.document_table import write_table  # noqa: E402

SHORTEST_BUDGET = 20
NAMES = ("joint", "prefill", "decode", "text_to_image", "documents")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(NAMES)} or all (default: all)")
    parser.add_argument("--size", choices=("smallest", "tiny", "full"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what both sides compute in (auto: float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="use torch.compile (auto: on a GPU)"
    )
    parser.add_argument("--pairs", type=int, default=8, help="repetitions of each side")
    parser.add_argument("--rows", type=int, help="rows of a train step (default: those of --size)")
    parser.add_argument("--json", type=Path, help="write the result into this file too")
    parser.add_argument("--document", type=Path, help="write the table into this file; needs all cases")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="measure what fits into this time")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of what --budget writes")
    parser.add_argument("--eager-only", action="store_true", help="with --budget: without torch.compile")
    parser.add_argument(
        "--together", type=int, metavar="N", help="with --budget: processes that compile at once"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write the table and the chart again")
    found = parser.parse_args(arguments)
    names = tuple(JOBS) if found.budget is not None else NAMES
    found.cases = list(names) if found.cases in ([], ["all"]) else found.cases
    if unknown := [name for name in found.cases if name not in names]:
        mode = "without --budget" if found.budget is None else "with --budget"
        parser.error(f"unknown {mode}: {', '.join(unknown)}; give {', '.join(names)}, or none for all")
    for name in ("compile", "pairs", "rows", "json"):
        if found.budget is not None and getattr(found, name) != parser.get_default(name):
            parser.error(f"--{name} belongs to the mode without --budget: leave it away")
    if found.document is not None and found.budget is not None:
        parser.error("--budget writes no document; give --report=DIR --document=FILE afterwards")
    if found.document is not None and found.report is None and set(found.cases) != set(NAMES):
        parser.error("--document needs all cases: name none")
    if found.pairs < 1:
        parser.error(f"--pairs is {found.pairs}; it must be at least 1")
    if (found.budget is None) != (found.out is None):
        parser.error("--budget and --out belong together: give the seconds and the folder")
    if found.budget is not None and found.budget < SHORTEST_BUDGET:
        parser.error(f"--budget is {found.budget:g}; it must be at least {SHORTEST_BUDGET} seconds")
    if found.together is not None and found.together < 1:
        parser.error(f"--together is {found.together}; it must be at least 1")
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in this process and returns {"environment": ..., "results": {name: measurement}}.

    Raises:
      ValueError: JAX does not run on the chosen device.
      Disagreement: the two sides do not compute the same result.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if options.device == "cpu" else "cuda")
    if options.size == "full":  # memory that one side frees is available to the other
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    import jax
    import torch

    from benchmarks.beside_torch.cases import CASES, Session, free_memory
    from benchmarks.beside_torch.inputs import Inputs
    from benchmarks.beside_torch.towers import TorchSettings

    gpu = options.device == "gpu"
    if jax.default_backend() != options.device:
        raise ValueError(
            f"JAX runs on {jax.default_backend()}, but --device is {options.device}. Install JAX for "
            f"{options.device}, or pass --device={jax.default_backend()}."
        )
    dtype = ("bfloat16" if gpu else "float32") if options.dtype == "auto" else options.dtype
    size = make_size(options.size, dtype)
    if options.rows is not None:
        size = dataclasses.replace(size, rows=options.rows)
    compiled = gpu if options.compile == "auto" else options.compile == "on"
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch_settings = TorchSettings("cuda" if gpu else "cpu", compiled)
    session = Session(Inputs(size, on_device=gpu), torch_settings, options.pairs)
    environment, results = measurement_environment(options, compiled), {}
    for name in options.cases:
        for title, measurement in CASES[name](session).items():
            results[title] = measurement
            print(f"{title}: {measurement['ratio']:.2f} x PyTorch", file=sys.stderr, flush=True)
        free_memory()
    return {"environment": environment, "results": results}


def run_in_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each case in its own process and returns the same as `run`.

    Raises:
      ChildProcessError: a case failed. Its process has written the reason to stderr.
    """
    found: dict[str, Any] = {"results": {}}
    passed_on = {"size": options.size, "device": options.device, "compile": options.compile}
    passed_on |= {"dtype": options.dtype}
    passed_on |= {"pairs": options.pairs} | ({} if options.rows is None else {"rows": options.rows})
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "case.json"
            command = [sys.executable, "-m", "benchmarks.beside_torch", name, f"--json={output}"]
            command += [f"--{key}={value}" for key, value in passed_on.items()]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise ChildProcessError(f"The case {name} failed and was not measured.")
            case = json.loads(output.read_text(encoding="utf-8"))
        found["results"] |= case["results"]
        found.setdefault("environment", case["environment"] | {"command": command_line()})
    return found


def main() -> int:
    """Parses the command line, measures, prints the results and returns the exit code."""
    options = parse()
    if options.report is not None or options.budget is not None:
        try:
            if options.report is not None:
                return int(not summary.write(options.report, options.document))
            return budget.measure(options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    separate_processes = options.device == "cpu" and len(options.cases) > 1
    try:
        found = run_in_processes(options) if separate_processes else run(options)
    except (Disagreement, ValueError, ChildProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.document is not None:
        write_table(options.document, "beside torch", rows(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
