"""Memory and time of a step before it is compiled: rough, but in milliseconds, to choose what to compile."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.chips import Chip
from dreamllm_jax.aot.memory import FREE, bytes_held
from dreamllm_jax.aot.program import abstract_batch
from dreamllm_jax.aot.roofline import roofline
from dreamllm_jax.aot.work import work
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import activation_spec, mesh_axes
from dreamllm_jax.train.flops import passes, step_flops
from dreamllm_jax.train.state import abstract_state

# Bytes a second between a chip and its host's memory, one way. A guess: PCIe of the fourth generation among
# a host's chips; nothing is published.
HOST = 8e9
# The part of what the llama keeps that is split along `tensor`, by remat: the rest are states. Rounded.
SPLIT = {"none": 0.65, "dots": 0.65, "minimal": 0.5, "full": 0.0, "offload": 0.0}


@dataclasses.dataclass(frozen=True)
class Held:
    """What lies on a chip of a mesh, in bytes, whatever the micro-batch and the remat.

    `state` is exact: parameters, optimizer, EMA and batch. `weights` are copies to compute with, gathered
    or cast; `gradients` are those of one micro-batch. `gathered` and `reduced`: bytes that travel along fsdp
    and data.
    """

    state: float
    weights: float
    gradients: float
    collectives: tuple[Collective, ...]  # of one micro-batch
    once: tuple[Collective, ...]  # of a step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one candidate: bytes on a chip, and seconds.

    `sure` is what no program can do without; `loose` what XLA's buffers may halve or double. `seconds` is the
    roofline's bound, `serial` the same where nothing overlaps.
    """

    sure: float
    loose: float
    seconds: float
    serial: float

    def memory(self, scale: float = 1.0) -> float:
        """Bytes, where what is loose is taken so many times."""
        return self.sure + scale * self.loose

    def fits(self, chip: Chip, scale: float = 1.0) -> bool:
        return self.memory(scale) <= (1 - FREE) * chip.hbm


@dataclasses.dataclass(frozen=True)
class Load:
    """What a stage asks of its towers, on any mesh: FLOPs of a step, and passes (see `train.flops`)."""

    flops: dict[str, float]
    passes: dict[str, int]

    @property
    def steered(self) -> dict[str, bool]:
        """The towers whose remat matters, since gradients flow through them; and whether to their weights."""
        towers = [t for t in ("llama", "vision", "unet") if t in self.flops and self.passes[t] > 1]
        return {tower: self.passes[tower] == 3 for tower in towers}


def load_of(recipe: Recipe, stage: StageConfig) -> Load:
    """Traced, which takes seconds."""
    return Load(step_flops(recipe.model, stage), passes(recipe.model, stage))


def held(recipe: Recipe, stage: StageConfig, load: Load, params: Flat, mesh: Mesh) -> Held:
    """Of a mesh with its `replicated`, which `recipe` names.

    The llama's weights are gathered layer by layer in each micro-batch, or whole by `gather: step`; a tower
    that is no scan of layers is gathered once a step and stays. Gradients travel in the model's dtype.
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
            weights += local  # cast, before it is gathered
        if path in state.trainable and "fsdp" in spec:
            scattered += full
        if full == local:
            continue
        if path.startswith("llama/layers/") and not steps:
            often += full
            weights += 2 * full / x.shape[0]  # this layer's, and the next one's on its way
        else:
            once += full
            weights += full
    trained = bytes_held(state.trainable)
    times = 2.0 if load.passes["llama"] > 1 else 1.0
    each = [_collective(mesh, "all-gather", ("fsdp",), often, times)]
    each += [_collective(mesh, "reduce-scatter", ("fsdp",), scattered)]
    each += [_collective(mesh, "all-reduce", ("data",), trained)]
    return Held(
        bytes_held((state, abstract_batch(recipe, stage, mesh))),
        weights,
        trained,
        tuple(c for c in each if c),
        tuple(c for c in [_collective(mesh, "all-gather", ("fsdp",), once)] if c),
    )


def _collective(
    mesh: Mesh, kind: str, axes: tuple[str, ...], size: float, times: float = 1.0
) -> Collective | None:
    """Of `size` bytes on a device before (reduced) or after (gathered); none along an axis of one device."""
    group = math.prod(mesh.shape[name] for name in axes)
    return Collective(kind, axes, group, size, size, (), "", times) if group > 1 and size else None


def estimate(recipe: Recipe, stage: StageConfig, load: Load, held: Held, mesh: Mesh, chip: Chip) -> Estimate:
    """Of a stage, with the recipe's remat and the stage's accumulation, on a mesh whose `held` is known."""
    parts, total, remat = stage.optim.grad_accum_steps, load.flops, recipe.model.remat
    share = {tower: 1 / devices_of(tower, stage, mesh) for tower in total}
    micro = {t: stage.data.batch_size * (_pictures(stage, t) if t != "llama" else 1) / parts for t in total}
    flops = {tower: n * share[tower] for tower, n in total.items()}
    kept, offloaded, layers = 0.0, 0.0, [0.0]
    for tower, trained in load.steered.items():
        policy = getattr(remat, tower)
        of = work(recipe.model, tower, policy, trained, stage.data.length)
        here = micro[tower] * share[tower]
        flops[tower] += parts * here * of.again
        if tower == "llama":  # `tensor` splits heads and widths, not the states
            n = mesh.shape["tensor"]
            layers.append(here * n * of.layer * (1 - SPLIT["none"] + SPLIT["none"] / n))
            here *= n * (1 - SPLIT[policy] + SPLIT[policy] / n)
        else:
            layers.append(here * of.layer)
        kept, offloaded = kept + here * of.kept, offloaded + here * of.offloaded
    head = _Head(recipe, stage, mesh)
    if "llama" in flops:
        flops["llama"] += head.again
    collectives = [dataclasses.replace(c, times=c.times * parts) for c in held.collectives]
    collectives += [*held.once, *_states(recipe, stage, load, mesh)]
    # The state is read and written once a step; gradients and what is kept, in every micro-batch.
    moved = 2 * held.state + 2 * parts * (held.gradients + kept)
    roof = roofline(Census(flops, moved, collectives), math.fsum(total.values()), mesh, chip)
    gradients = held.gradients * (2 if parts > 1 else 1)
    host = 2 * parts * offloaded / HOST
    loose = held.weights + kept + max(*layers, head.bytes)
    return Estimate(held.state + gradients, loose, max(roof.bound, host), roof.serial + host)


def _pictures(stage: StageConfig, tower: str) -> int:
    """Of one row."""
    return stage.data.max_images if tower == "vision" else stage.data.max_dreams


def devices_of(tower: str, stage: StageConfig, mesh: Mesh) -> int:
    """How many devices a tower's work is split over: all, or as many as divide the pictures."""
    if tower == "llama":
        return mesh.size
    number = stage.data.batch_size * _pictures(stage, tower) // stage.optim.grad_accum_steps
    spec = activation_spec(("pictures",), (number,), mesh)
    return math.prod(mesh.shape[name] for entry in spec for name in mesh_axes(entry))


class _Head:
    """The llama's logits and loss, chunk by chunk: bytes at once, FLOPs a device computes again."""

    def __init__(self, recipe: Recipe, stage: StageConfig, mesh: Mesh):
        self.bytes = self.again = 0.0
        llama, data, shape = recipe.model.llama, stage.data, mesh.shape
        if llama is None:
            return
        columns, chunk = llama.vocab_size / shape["tensor"], min(stage.loss.logits_chunk, data.length)
        rows = data.batch_size / stage.optim.grad_accum_steps / (shape["data"] * shape["fsdp"])
        # float32: the logits and their gradient, the matrix and its own.
        self.bytes = 2 * 4 * columns * (rows * chunk / shape["context"] + llama.hidden_size)
        if chunk < data.length:
            self.again = (
                2.0 * data.batch_size * data.length * llama.hidden_size * llama.vocab_size / mesh.size
            )


def _states(recipe: Recipe, stage: StageConfig, load: Load, mesh: Mesh) -> list[Collective]:
    """Of the llama's layers: sums of states over `tensor`, keys and values gathered along `context`."""
    llama, shape = recipe.model.llama, mesh.shape
    if llama is None:
        return []
    rows = stage.data.batch_size / (stage.optim.grad_accum_steps * shape["data"] * shape["fsdp"])
    states = jnp.dtype(recipe.model.dtype).itemsize * rows * stage.data.length * llama.hidden_size
    back = load.passes["llama"] > 1
    runs = float(stage.optim.grad_accum_steps) * llama.num_hidden_layers
    forward = runs * (1 + (back and recipe.model.remat.llama in ("minimal", "full", "offload")))
    found = [
        _collective(mesh, "all-reduce", ("tensor",), states / shape["context"], 2 * (forward + back * runs)),
        _collective(mesh, "all-gather", ("context",), 2 * states / shape["tensor"], forward),
        _collective(mesh, "reduce-scatter", ("context",), 2 * states / shape["tensor"], back * runs),
    ]
    return [c for c in found if c]
