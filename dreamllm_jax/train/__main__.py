"""`python -m dreamllm_jax.train --config=configs/handwriting.py --workdir=FOLDER`: trains a recipe.

Any setting can be changed behind it: `--config.seed=1`, `--config.stages.stage2.steps=100`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from dreamllm_jax import distributed
from dreamllm_jax.config.recipe_files import load_recipe


def main() -> None:
    """Parses the command line, trains, and says where the model is.

    The exit code is 2 where what was asked for is wrong, 143 where a SIGTERM ended the run (its state is
    saved), 1 where something else ended it.
    """
    parser = argparse.ArgumentParser(prog="python -m dreamllm_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, help="recipe file, e.g. configs/handwriting.py[:ARG]")
    parser.add_argument("--workdir", required=True, help="folder for checkpoints, logs and models")
    parser.add_argument("--until", help="stop after the stage of this name")
    arguments, overrides = parser.parse_known_args()
    try:
        distributed.initialize()
        from dreamllm_jax.convert.opening import open_model
        from dreamllm_jax.train.loop import train

        recipe = load_recipe(arguments.config, overrides)
        model = train(recipe, Path(arguments.workdir), arguments.until, open_model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        distributed.exit_process(1)
    except distributed.Preempted as notice:
        distributed.print_on_main(notice)
        distributed.exit_process(128 + signal.SIGTERM)
    else:
        distributed.print_on_main(f"trained: {model}")


if __name__ == "__main__":
    main()
