"""Reads recipes from the Python files of `configs/`.

A recipe file has one function, `get_config(arg)`. It returns an `ml_collections.ConfigDict`, made from the
typed dataclasses of `config` by `to_config_dict`, so that an editor completes a recipe and pyright checks it:

    def get_config(arg: str | None = None) -> ConfigDict:
        stage = StageConfig(name="one", trainable=("llama",), steps=100, data=DataConfig(...))
        return to_config_dict(Recipe(name="mine", model=DreamLLMConfig(...), stages=(stage,)))
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from dreamllm_jax.config.base import to_editable_dict
from dreamllm_jax.config.overrides import apply_overrides
from dreamllm_jax.config.train import Recipe, build_recipe


def to_config_dict(recipe: Recipe) -> ConfigDict:
    """Returns the recipe as the ConfigDict that `get_config` is to return, ready for overrides."""
    return ConfigDict(to_editable_dict(recipe))


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a file: `configs/NAME.py`, or `configs/NAME.py:ARG` for a variant of it.

    `overrides` are `--config.PATH=VALUE`, applied last.

    Raises:
      ValueError: the file does not exist or has no `get_config`, or the recipe is wrong.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise ValueError(
            f"--config={name}: the file does not exist; give a recipe, for example configs/stage2.py."
        )
    spec = importlib.util.spec_from_file_location("recipe_file", name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _folder_on_path(Path(name).resolve().parent):
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError(
                f"--config={name}: the file has no function get_config(arg); see configs/stage2.py for a "
                "recipe."
            )
        config = module.get_config(argument or None)
    plain = (
        config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(config)
    )  # overrides change it
    return build_recipe(apply_overrides(plain, overrides))


@contextmanager
def _folder_on_path(folder: Path) -> Iterator[None]:
    """Lets a recipe import its neighbours, and forgets them afterwards.

    Two folders may both have a `common.py`; each recipe must get its own.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().parent == folder:
                del sys.modules[name]
