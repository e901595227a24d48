"""`python -m dreamllm_jax.evaluate --workdir=FOLDER`: measures a trained handwriting model, and shows it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamllm_jax import distributed


def main() -> None:
    """Parses the command line, evaluates, and says where the results are.

    The exit code is 2 where what was asked for is wrong, 1 where something else ended the run.
    """
    parser = argparse.ArgumentParser(prog="python -m dreamllm_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="work folder of a finished training run")
    workdir = Path(parser.parse_args().workdir)
    try:
        distributed.initialize()
        if not distributed.is_main():  # one measures
            distributed.barrier("evaluated")
            return
        from dreamllm_jax.evaluate.run import evaluate, summary

        new = evaluate(workdir)
        distributed.barrier("evaluated")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(1)
    print(summary(workdir))
    print(f"{'evaluated' if new else 'evaluated before, nothing to do'}: {workdir / 'report.html'}")


if __name__ == "__main__":
    main()
