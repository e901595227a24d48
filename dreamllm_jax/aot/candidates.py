"""The meshes, gradient accumulation steps and remat policies that a stage could run with on given devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from dreamllm_jax.aot.estimate import StageWork
from dreamllm_jax.config.model import TOWERS, RematConfig
from dreamllm_jax.config.train import MeshConfig, Recipe, StageConfig
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.recipe_checks import check_attention_kernels, check_batch_size, check_shardings
from dreamllm_jax.train.state import partition

REMATS = ("none", "dots", "minimal", "full", "offload")
# Limits of the search, an assumption: with fewer tokens of a row per chip, or with a layer split over more
# chips, a candidate is not the fastest that fits.
LEAST_TOKENS = 256
MOST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The settings of a recipe that the search varies. The batch size stays."""

    mesh: MeshConfig
    grad_accum_steps: int
    remat: RematConfig

    def applied(self, recipe: Recipe, stage: StageConfig) -> tuple[Recipe, StageConfig]:
        """Returns the recipe and its stage with these settings."""
        changed = dataclasses.replace(
            stage, optim=dataclasses.replace(stage.optim, grad_accum_steps=self.grad_accum_steps)
        )
        stages = tuple(changed if s.name == stage.name else s for s in recipe.stages)
        model = dataclasses.replace(recipe.model, remat=self.remat)
        return dataclasses.replace(recipe, mesh=self.mesh, model=model, stages=stages), changed

    def overrides(self, stage: StageConfig) -> list[str]:
        """Returns all settings as overrides for the command line, including those that equal the recipe's."""
        mesh = {f"mesh.{name}": value for name, value in vars(self.mesh).items()}
        mesh["mesh.replicated"] = repr(self.mesh.replicated).replace(" ", "").replace("'", '"')
        remat = {f"model.remat.{tower}": policy for tower, policy in vars(self.remat).items()}
        parts = {f"stages.{stage.name}.optim.grad_accum_steps": self.grad_accum_steps}
        return [f"--config.{path}={value}" for path, value in (mesh | parts | remat).items()]

    def title(self) -> tuple[str, str, str]:
        """Returns the mesh, the gradient accumulation and the remat policies as text."""
        axes = {k: v for k, v in vars(self.mesh).items() if k != "replicated" and v > 1}
        mesh = " x ".join(f"{name} {n}" for name, n in axes.items()) or "1 chip"
        if self.mesh.replicated:
            mesh += f", replicated {'+'.join(self.mesh.replicated)}"
        remat = ", ".join(f"{tower} {policy}" for tower, policy in vars(self.remat).items())
        return mesh, f"accumulation {self.grad_accum_steps}", f"remat {remat}"


def meshes(
    recipe: Recipe, stage: StageConfig, params: Flat, devices: list[Any]
) -> list[tuple[MeshConfig, Mesh]]:
    """Returns every mesh over all devices that the parameters and a micro-batch of one row per device allow.

    Raises:
      ValueError: no mesh satisfies these limits.
    """
    least = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, grad_accum_steps=1))
    found, rejections = [], ["its rows are too short to split"]
    for sizes in _factors(len(devices), 4):
        _, _, tensor, context = sizes
        if tensor > MOST_TENSOR or stage.data.length % context:
            continue
        if context > max(1, stage.data.length // LEAST_TOKENS):
            continue
        for replicated in _replicated_choices(stage, params) if sizes[1] > 1 else [()]:
            config = MeshConfig(*sizes, replicated=replicated)
            try:
                mesh = make_mesh(config, devices)
                check_attention_kernels(recipe.model, mesh)
                check_batch_size(least, mesh)
                check_shardings(stage, params, mesh, replicated)
            except ValueError as error:
                rejections.append(str(error))
            else:
                found.append((config, mesh))
    if not found:
        raise ValueError(
            f"no mesh of {len(devices)} devices fits stage {stage.name!r}; the last rejection: "
            f"{rejections[-1]}"
        )
    return found


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields all tuples of `parts` factors whose product is `number`."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield first, *rest


def _replicated_choices(stage: StageConfig, params: Flat) -> list[tuple[str, ...]]:
    """Returns the choices for `mesh.replicated`: nothing, the frozen image towers, or all frozen towers."""
    trainable, frozen = ({path.split("/")[0] for path in part} for part in partition(params, stage.trainable))
    towers = [name for name in TOWERS if name in frozen - trainable]
    of_images = tuple(name for name in towers if name != "llama")
    return list(dict.fromkeys([(), of_images, tuple(towers)]))


def grad_accum_options(stage: StageConfig, mesh: Mesh) -> list[int]:
    """Returns the numbers of micro-batches that leave every device at least one row."""
    rows = stage.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return [n for n in range(1, rows + 1) if rows % n == 0]


def remats(recipe: Recipe, work_of_stage: StageWork) -> list[RematConfig]:
    """Returns all combinations of policies for the towers that gradients flow through."""
    towers = list(work_of_stage.with_gradients)
    return [
        dataclasses.replace(recipe.model.remat, **dict(zip(towers, policies, strict=True)))
        for policies in itertools.product(REMATS, repeat=len(towers))
    ]
