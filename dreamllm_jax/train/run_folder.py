"""The work folder of a run: what is where, which recipe it belongs to, and which stages are done.

    recipe.json               the recipe; a folder belongs to one
    index/                    indexes of webdataset tars, shared by all processes and restarts
    stages/<n>_<name>/        a stage (`StageFolder`):
      states/                   train states within the stage (orbax); removed at its end
      logs/                     curves.jsonl, speed.jsonl, validation.jsonl, tensorboard/, profile/
      samples/                  documents written during training
      model/                    the model after the stage: `DreamLLM.from_pretrained` loads it
      done.json                 seconds, peak memory, data statistics; present when the stage is complete

With several processes, process 0 writes these files, except for states and models, which all write. The
folder is on a filesystem that all of them share.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from dreamllm_jax import distributed
from dreamllm_jax.checkpoint.json_files import read_json, write_json
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.hooks import HooksConfig
from dreamllm_jax.config.model import AttentionConfig, RematConfig
from dreamllm_jax.config.train import MeshConfig, OptimConfig, Recipe, StageConfig, build_recipe


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """The folder of one stage."""

    path: Path

    @property
    def states(self) -> Path:
        return self.path / "states"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def done_file(self) -> Path:
        return self.path / "done.json"

    def is_done(self) -> bool:
        """Returns whether the stage is complete."""
        return self.done_file.exists()

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the stage as complete, and removes its train states. Process 0 does so."""
        if distributed.is_main():
            write_json(self.done_file, summary)
            shutil.rmtree(self.states, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The work folder of one recipe."""

    path: Path
    recipe: Recipe

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.json"

    @property
    def index(self) -> Path:
        return self.path / "index"

    def stage(self, stage: StageConfig) -> StageFolder:
        """Returns the folder of a stage, for example `stages/1_joint`."""
        return StageFolder(self.path / "stages" / f"{self.recipe.stages.index(stage)}_{stage.name}")

    def check(self) -> None:
        """Checks that the folder is free, or belongs to this recipe.

        Settings that change how, not what, is computed may differ: see `without_execution`.

        Raises:
          ValueError: the path is a file, or the folder belongs to another recipe.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give a folder, which is created if it does not exist.")
        if not self.recipe_file.exists():
            return
        if without_execution(read_recipe(self.recipe_file)) != without_execution(self.recipe):
            raise ValueError(
                f"{self.path} holds a run of another recipe, or of other settings of it (recipe.json differs "
                f"from {self.recipe.name!r}); choose an empty folder, or remove this one."
            )

    def claim(self) -> None:
        """Writes the recipe into the folder, which belongs to it from now on.

        Raises:
          ValueError, OSError: the processes do not share the folder, or it cannot be written.
        """
        distributed.check_shared_folder(self.path)
        if distributed.is_main():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.recipe_file, to_dict(self.recipe))


def read_recipe(file: Path) -> Recipe:
    """Reads a recipe.json, also one that an earlier version wrote.

    Raises:
      ValueError: the file is missing, damaged, or not a recipe.
    """
    try:
        return build_recipe(read_json(file), saved=True)
    except ValueError as error:
        raise ValueError(
            f"{file} does not hold a recipe of this version ({error}); choose an empty work folder."
        ) from error


def recipe_text(recipe: Recipe) -> str:
    """Returns the recipe as JSON text, for comparison between processes."""
    return json.dumps(to_dict(recipe), indent=1)


def without_execution(recipe: Recipe) -> Recipe:
    """Returns the recipe with defaults for what does not change the trained model.

    These are the mesh, saving, logging and hooks, rematerialization, attention kernels, whether layers are a
    loop, and how gradients are accumulated and weights gathered. A run may continue with other values.
    """
    default = {field.name: field.default for field in dataclasses.fields(Recipe)}
    return dataclasses.replace(
        recipe,
        mesh=MeshConfig(),
        hooks=HooksConfig(),
        **{name: default[name] for name in ("checkpoint_every", "keep_checkpoints", "log_every")},
        model=dataclasses.replace(
            recipe.model, remat=RematConfig(), attention=AttentionConfig(), scan_layers=None
        ),
        stages=tuple(
            dataclasses.replace(
                stage,
                optim=dataclasses.replace(
                    stage.optim,
                    grad_accum_steps=OptimConfig().grad_accum_steps,
                    gather=OptimConfig().gather,
                ),
            )
            for stage in recipe.stages
        ),
    )
