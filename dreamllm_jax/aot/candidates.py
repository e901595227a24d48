"""The meshes, accumulations and remats that a stage could run with on some devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from dreamllm_jax.aot.estimate import Load
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.train import MeshConfig, Recipe, StageConfig
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.recipe_checks import check_attention_kernels, check_batch_size, check_shardings
from dreamllm_jax.train.state import partition

REMATS = ("none", "dots", "minimal", "full", "offload")
PICTURES = ("vision", "unet", "vae")
# Fewer tokens of a row on a chip, and more chips for a layer, are never the best of what fits.
LEAST_TOKENS = 256
MOST_TENSOR = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What the search may change of a recipe; the rows of a step stay."""

    mesh: MeshConfig
    grad_accum_steps: int
    remat: RematConfig

    def applied(self, recipe: Recipe, stage: StageConfig) -> tuple[Recipe, StageConfig]:
        """The recipe and its stage with this in place of their own."""
        changed = dataclasses.replace(
            stage, optim=dataclasses.replace(stage.optim, grad_accum_steps=self.grad_accum_steps)
        )
        stages = tuple(changed if s.name == stage.name else s for s in recipe.stages)
        model = dataclasses.replace(recipe.model, remat=self.remat)
        return dataclasses.replace(recipe, mesh=self.mesh, model=model, stages=stages), changed

    def overrides(self, stage: StageConfig) -> list[str]:
        """For the command line, with every setting of the candidate, also those that the recipe has."""
        mesh = {f"mesh.{name}": value for name, value in vars(self.mesh).items()}
        mesh["mesh.replicated"] = repr(self.mesh.replicated).replace(" ", "").replace("'", '"')
        remat = {f"model.remat.{tower}": policy for tower, policy in vars(self.remat).items()}
        parts = {f"stages.{stage.name}.optim.grad_accum_steps": self.grad_accum_steps}
        return [f"--config.{path}={value}" for path, value in (mesh | parts | remat).items()]

    def title(self) -> tuple[str, str, str]:
        """Mesh, accumulation and remat, in words."""
        axes = {k: v for k, v in vars(self.mesh).items() if k != "replicated" and v > 1}
        mesh = " x ".join(f"{name} {n}" for name, n in axes.items()) or "1 chip"
        if self.mesh.replicated:
            mesh += f", whole {'+'.join(self.mesh.replicated)}"
        remat = ", ".join(f"{tower} {policy}" for tower, policy in vars(self.remat).items())
        return mesh, f"accumulation {self.grad_accum_steps}", f"remat {remat}"


def meshes(
    recipe: Recipe, stage: StageConfig, params: Flat, devices: list[Any]
) -> list[tuple[MeshConfig, Mesh]]:
    """Every mesh of all devices that the parameters and a micro-batch of one row a device allow.

    Raises:
      ValueError: there is none.
    """
    least = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, grad_accum_steps=1))
    found, refused = [], ["its rows are too short to split"]
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
                refused.append(str(error))
            else:
                found.append((config, mesh))
    if not found:
        raise ValueError(
            f"no mesh of {len(devices)} devices suits stage {stage.name!r}; the last: {refused[-1]}"
        )
    return found


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All that multiply to `number`, in order."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield first, *rest


def _replicated_choices(stage: StageConfig, params: Flat) -> list[tuple[str, ...]]:
    """None, the frozen towers of pictures, or all frozen towers."""
    trainable, frozen = ({path.split("/")[0] for path in part} for part in partition(params, stage.trainable))
    towers = [name for name in ("llama", *PICTURES) if name in frozen - trainable]
    pictures = tuple(name for name in towers if name != "llama")
    return list(dict.fromkeys([(), pictures, tuple(towers)]))


def accumulations(stage: StageConfig, mesh: Mesh) -> list[int]:
    """The numbers of micro-batches that leave every device a row at least."""
    rows = stage.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return [n for n in range(1, rows + 1) if rows % n == 0]


def remats(recipe: Recipe, load: Load) -> list[RematConfig]:
    """Every policy for each tower that gradients flow through; the recipe's for all others."""
    towers = list(load.steered)
    return [
        dataclasses.replace(recipe.model.remat, **dict(zip(towers, policies, strict=True)))
        for policies in itertools.product(REMATS, repeat=len(towers))
    ]
