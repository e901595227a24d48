"""`python -m dreamllm_jax.train --config=configs/handwriting.py --workdir=FOLDER`: trains a recipe.

Any setting can be changed behind it: `--config.seed=1`, `--config.stages.stage2.steps=100`.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dreamllm_jax import processes
from dreamllm_jax.config.overrides import apply_overrides
from dreamllm_jax.config.train import Recipe
from dreamllm_jax.config.train import recipe as build_recipe


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file `configs/NAME.py`, or `configs/NAME.py:ARG` for a variant of it.

    `overrides` are `--config.PATH=VALUE`, applied last.

    Raises:
      ValueError: there is no such file, or it has no `get_config`, or the recipe is wrong.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise ValueError(
            f"--config={name}: there is no such file; give a recipe, for example configs/stage2.py."
        )
    spec = importlib.util.spec_from_file_location("recipe_file", name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(name).resolve().parent))  # recipes build on one another
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"--config={name}: the file has no function get_config(arg); see configs/handwriting.py."
        )
    recipe = module.get_config(argument or None)
    plain = recipe.to_dict() if isinstance(recipe, ConfigDict) else recipe
    return build_recipe(apply_overrides(plain, overrides))


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
        processes.initialize()
        from dreamllm_jax.train.loop import train

        model = train(load_recipe(arguments.config, overrides), Path(arguments.workdir), arguments.until)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        processes.leave(1)
    except processes.Preempted as notice:
        processes.say(notice)
        processes.leave(128 + signal.SIGTERM)
    else:
        processes.say(f"trained: {model}")


if __name__ == "__main__":
    main()
