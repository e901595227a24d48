"""Loads recipes from the Python files of `configs/`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

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
