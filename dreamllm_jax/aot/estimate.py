"""Estimates the memory and time of a step without compiling it, in milliseconds, to choose what to
compile.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.memory import FREE_SHARE, bytes_held
from dreamllm_jax.aot.program import abstract_batch
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.aot.work import work
from dreamllm_jax.config.chips import Chip
from dreamllm_jax.config.model import RematConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import activation_spec, mesh_axes
from dreamllm_jax.train.flops import passes, step_flops
from dreamllm_jax.train.state import abstract_state

# Bytes per second between a chip and its host's memory, one way. An assumption: PCIe 4.0 shared by a host's
# chips. No figure is published.
HOST_BANDWIDTH = 8e9
# The share of the language model's activations that is split along `tensor`, by remat policy. The rest are
# hidden states, which are not. Rounded.
SPLIT_SHARE = {"none": 0.65, "dots": 0.65, "minimal": 0.5, "full": 0.0, "offload": 0.0}


@dataclasses.dataclass(frozen=True)
class MeshCosts:
    """Bytes on a chip of a mesh that depend neither on the micro-batch nor on remat.

    `state` is exact: parameters, optimizer, EMA and batch. `weights` are copies for computing, gathered or
    cast; `gradients` are those of one micro-batch.
    """

    state: float
    weights: float
    gradients: float
    collectives: tuple[Collective, ...]  # of one micro-batch
    once: tuple[Collective, ...]  # of a step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on a chip and seconds of one candidate.

    `certain` bytes are needed by any program; `uncertain` ones may be halved or doubled by XLA's buffer
    assignment. `seconds` is the roofline's bound, `serial` the time if nothing overlaps.
    """

    certain: float
    uncertain: float
    seconds: float
    serial: float

    def memory(self, scale: float = 1.0) -> float:
        """Returns the bytes in all, with the uncertain ones scaled."""
        return self.certain + scale * self.uncertain

    def fits(self, chip: Chip, scale: float = 1.0) -> bool:
        return self.memory(scale) <= (1 - FREE_SHARE) * chip.hbm


@dataclasses.dataclass(frozen=True)
class StageWork:
    """The work of a stage's towers on any mesh: FLOPs of a step, and passes (see `train.flops`)."""

    flops: dict[str, float]
    passes: dict[str, int]

    @property
    def with_gradients(self) -> dict[str, bool]:
        """The towers that gradients flow through, so that their remat matters; and whether their weights are
        trained.
        """
        names = [field.name for field in dataclasses.fields(RematConfig)]
        towers = [name for name in names if name in self.flops and self.passes[name] > 1]
        return {tower: self.passes[tower] == 3 for tower in towers}


def stage_work(recipe: Recipe, stage: StageConfig) -> StageWork:
    """Counts the work of a stage by tracing it, which takes seconds."""
    return StageWork(step_flops(recipe.model, stage), passes(recipe.model, stage))


def mesh_costs(
    recipe: Recipe, stage: StageConfig, work_of_stage: StageWork, params: Flat, mesh: Mesh
) -> MeshCosts:
    """Returns the costs of a mesh, with the towers that `recipe.mesh.replicated` names not sharded along
    fsdp.

    The language model's weights are gathered layer by layer in each micro-batch, or once a step with `gather:
    step`. A tower that is not a scan over layers is gathered once a step and kept. Gradients travel in the
    model's dtype.
    """
    state = abstract_state(params, stage, recipe, mesh)
    size, dtype = dict(mesh.shape), jnp.dtype(recipe.model.dtype).itemsize
    steps = stage.optim.gather == "step"
    weights, often, once, scattered = 0.0, 0.0, 0.0, 0.0
    for path, x in (state.trainable | state.frozen).items():
        spec = [name for entry in x.sharding.spec for name in mesh_axes(entry)]
        local = dtype * math.prod(x.sharding.shard_shape(x.shape))
        full = local * (size["fsdp"] if "fsdp" in spec else 1)
        if x.dtype.itemsize != dtype and len(x.shape) > 1:
            weights += local  # the cast copy, before gathering
        if path in state.trainable and "fsdp" in spec:
            scattered += full
        if full == local:
            continue
        if path.startswith("llama/layers/") and not steps:
            often += full
            weights += 2 * full / x.shape[0]  # the current layer, and the next one being gathered
        else:
            once += full
            weights += full
    trained = bytes_held(state.trainable)
    times = 2.0 if work_of_stage.passes["llama"] > 1 else 1.0
    each = [_collective(mesh, "all-gather", ("fsdp",), often, times)]
    each += [_collective(mesh, "reduce-scatter", ("fsdp",), scattered)]
    each += [_collective(mesh, "all-reduce", ("data",), trained)]
    return MeshCosts(
        bytes_held((state, abstract_batch(recipe, stage, mesh))),
        weights,
        trained,
        tuple(c for c in each if c),
        tuple(c for c in [_collective(mesh, "all-gather", ("fsdp",), once)] if c),
    )


def _collective(
    mesh: Mesh, kind: str, axes: tuple[str, ...], size: float, times: float = 1.0
) -> Collective | None:
    """Returns a collective of `size` bytes per device, before reducing or after gathering; None for one
    device.
    """
    group = math.prod(mesh.shape[name] for name in axes)
    return Collective(kind, axes, group, size, size, (), "", times) if group > 1 and size else None


def estimate(
    recipe: Recipe, stage: StageConfig, work_of_stage: StageWork, costs: MeshCosts, mesh: Mesh, chip: Chip
) -> Estimate:
    """Estimates a stage with the recipe's remat and the stage's gradient accumulation, on a mesh with these
    `costs`.
    """
    parts, total, remat = stage.optim.grad_accum_steps, work_of_stage.flops, recipe.model.remat
    share = {tower: 1 / devices_of(tower, stage, mesh) for tower in total}
    micro = {t: stage.data.batch_size * (_pictures(stage, t) if t != "llama" else 1) / parts for t in total}
    flops = {tower: n * share[tower] for tower, n in total.items()}
    kept, offloaded, layers = 0.0, 0.0, [0.0]
    for tower, trained in work_of_stage.with_gradients.items():
        policy = getattr(remat, tower)
        of = work(recipe.model, tower, policy, trained, stage.data.length)
        here = micro[tower] * share[tower]
        flops[tower] += parts * here * of.recomputed
        if tower == "llama":  # `tensor` splits heads and MLP width, not the hidden states
            n = mesh.shape["tensor"]
            layers.append(here * n * of.layer * (1 - SPLIT_SHARE["none"] + SPLIT_SHARE["none"] / n))
            here *= n * (1 - SPLIT_SHARE[policy] + SPLIT_SHARE[policy] / n)
        else:
            layers.append(here * of.layer)
        kept, offloaded = kept + here * of.kept, offloaded + here * of.offloaded
    head = _Head(recipe, stage, mesh)
    if "llama" in flops:
        flops["llama"] += head.recomputed
    collectives = [dataclasses.replace(c, times=c.times * parts) for c in costs.collectives]
    collectives += [*costs.once, *_states(recipe, stage, work_of_stage, mesh)]
    # The state is read and written once a step, gradients and activations in every micro-batch.
    moved = 2 * costs.state + 2 * parts * (costs.gradients + kept)
    roof = roofline(Census(flops, moved, collectives), math.fsum(total.values()), mesh, chip)
    gradients = costs.gradients * (2 if parts > 1 else 1)
    host = 2 * parts * offloaded / HOST_BANDWIDTH
    uncertain = costs.weights + kept + max(*layers, head.bytes)
    return Estimate(costs.state + gradients, uncertain, max(roof.bound, host), roof.serial + host)


def _pictures(stage: StageConfig, tower: str) -> int:
    """Returns the images of one row that a tower processes."""
    return stage.data.max_images if tower == "vision" else stage.data.max_dreams


def devices_of(tower: str, stage: StageConfig, mesh: Mesh) -> int:
    """Returns over how many devices a tower's work is split: all, or as many as divide the number of
    images.
    """
    if tower == "llama":
        return mesh.size
    number = stage.data.batch_size * _pictures(stage, tower) // stage.optim.grad_accum_steps
    spec = activation_spec(("pictures",), (number,), mesh)
    return math.prod(mesh.shape[name] for entry in spec for name in mesh_axes(entry))


class _Head:
    """Logits and loss of the language model, chunk by chunk: bytes held at once, and recomputed FLOPs of a
    device.
    """

    def __init__(self, recipe: Recipe, stage: StageConfig, mesh: Mesh):
        self.bytes = self.recomputed = 0.0
        llama, data, shape = recipe.model.llama, stage.data, mesh.shape
        if llama is None:
            return
        columns, chunk = llama.vocab_size / shape["tensor"], min(stage.loss.logits_chunk, data.length)
        rows = data.batch_size / stage.optim.grad_accum_steps / (shape["data"] * shape["fsdp"])
        # In float32: the logits and their gradient, the head's matrix and its gradient.
        self.bytes = 2 * 4 * columns * (rows * chunk / shape["context"] + llama.hidden_size)
        if chunk < data.length:
            self.recomputed = (
                2.0 * data.batch_size * data.length * llama.hidden_size * llama.vocab_size / mesh.size
            )


def _states(recipe: Recipe, stage: StageConfig, work_of_stage: StageWork, mesh: Mesh) -> list[Collective]:
    """Returns the collectives of the language model's layers: sums over `tensor`, keys and values along
    `context`.
    """
    llama, shape = recipe.model.llama, mesh.shape
    if llama is None:
        return []
    rows = stage.data.batch_size / (stage.optim.grad_accum_steps * shape["data"] * shape["fsdp"])
    states = jnp.dtype(recipe.model.dtype).itemsize * rows * stage.data.length * llama.hidden_size
    back = work_of_stage.passes["llama"] > 1
    runs = float(stage.optim.grad_accum_steps) * llama.num_hidden_layers
    forward = runs * (1 + (back and recipe.model.remat.llama in ("minimal", "full", "offload")))
    found = [
        _collective(mesh, "all-reduce", ("tensor",), states / shape["context"], 2 * (forward + back * runs)),
        _collective(mesh, "all-gather", ("context",), 2 * states / shape["tensor"], forward),
        _collective(mesh, "reduce-scatter", ("context",), 2 * states / shape["tensor"], back * runs),
    ]
    return [c for c in found if c]
