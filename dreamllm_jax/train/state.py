"""The train state: trainable and frozen parameters, the optimizer's state, and how they are sharded."""

from __future__ import annotations

import re
import typing
import zlib
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamllm_jax.checkpoint.parameter_files import to_device
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import parameter_shardings, path_string, replicated
from dreamllm_jax.train.optim import make_optimizer

# Arrays of an optimizer's state that belong to no parameter are replicated up to this number of elements.
SMALL = 1024


@typing.no_type_check  # shapes, shardings and checkpoint masks travel in the same container
@flax.struct.dataclass
class TrainState:
    """The state of a stage. Parameters are flat, `{"llama/norm/scale": array, ...}`.

    `ema` is empty if no average is kept. `key` is the raw data (uint32 [2]) of the stage's PRNG key.
    """

    step: Any
    key: Any
    trainable: Flat
    frozen: Flat
    opt_state: Any
    ema: Flat


def is_trainable(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern matches the beginning of the path, up to a `/` or the end.

    `llama` matches `llama/norm/scale`, and not `llama_2/norm/scale`.
    """
    return any(re.match(rf"(?:{p})(?:/|$)", path) for p in patterns)


def partition(params: Flat, patterns: Sequence[str]) -> tuple[Flat, Flat]:
    """Returns (trainable, frozen) parameters.

    Raises:
      ValueError: a pattern matches no parameter, or is not a regular expression.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"trainable pattern {pattern!r} is not a regular expression: {error}."
            ) from error
        if not any(is_trainable(path, [pattern]) for path in params):
            tops = sorted({p.split("/")[0] for p in params})
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter of this model; its parts are "
                f"{', '.join(tops)}."
            )
    trainable = {k: v for k, v in params.items() if is_trainable(k, patterns)}
    return trainable, {k: v for k, v in params.items() if k not in trainable}


def abstract_state(params: Flat, stage: StageConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of a stage's state; only the shapes of `params` are used.

    The parts of the model that `recipe.mesh.replicated` names are not sharded along fsdp.
    """
    trainable, frozen = partition(params, stage.trainable)
    trainable = _abstract(trainable, parameter_shardings(trainable, mesh), "float32")
    shardings = parameter_shardings(frozen, mesh, recipe.mesh.replicated)
    tx = make_optimizer(stage.optim)
    moments = jax.eval_shape(tx.init, trainable)
    on_all_devices = replicated(mesh)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=on_all_devices),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=on_all_devices),
        trainable=trainable,
        frozen=_abstract(frozen, shardings, recipe.frozen_dtype),
        opt_state=_abstract(moments, optimizer_shardings(tx, trainable, mesh)),
        ema=trainable if stage.optim.ema_decay else {},
    )


def _abstract(tree: Any, shardings: Any, dtype: str | None = None) -> Any:
    def describe(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype if dtype is None else jnp.dtype(dtype), sharding=sharding
        )

    return jax.tree.map(describe, tree, shardings)


def create_state(params: Flat, stage: StageConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Returns the state at the beginning of a stage, sharded on the mesh.

    Parameters (arrays, or tensors in files) are copied. A host reads from files only what its own devices
    hold.
    """
    shape = abstract_state(params, stage, recipe, mesh)
    trainable, frozen = (
        {k: to_device(params[k], s.sharding, s.dtype) for k, s in part.items()}
        for part in (shape.trainable, shape.frozen)
    )
    shardings = jax.tree.map(lambda s: s.sharding, shape.opt_state)
    key = jax.random.fold_in(jax.random.key(recipe.seed), zlib.crc32(stage.name.encode()))
    return TrainState(
        step=jax.device_put(jnp.zeros((), shape.step.dtype), shape.step.sharding),
        key=jax.device_put(jax.random.key_data(key), shape.key.sharding),
        trainable=trainable,
        frozen=frozen,
        opt_state=jax.jit(make_optimizer(stage.optim).init, out_shardings=shardings)(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if stage.optim.ema_decay else {},
    )


def optimizer_shardings(tx: optax.GradientTransformation, trainable: Flat, mesh: Mesh) -> Any:
    """Returns the sharding of every array of the optimizer's state.

    An array that belongs to a parameter (its path ends with the parameter's) is sharded as that parameter is:
    along all axes if the shapes are the same, along the remaining ones if it is a mean over rows (`v_row`) or
    columns (`v_col`), as `optax.scale_by_factored_rms` holds. Scalars, placeholders of shape (1,) and small
    arrays that belong to no parameter, such as random keys, are replicated.

    Raises:
      ValueError: an array of any other shape: no rule says how to shard it.
    """
    shardings = parameter_shardings(trainable, mesh)

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = path_string(path).split("/")
        name = next((n for i in range(len(names)) if (n := "/".join(names[i:])) in shardings), None)
        if leaf.shape in ((), (1,)) or (name is None and leaf.size <= SMALL):
            return replicated(mesh)
        shape = None if name is None else trainable[name].shape
        if name is not None and leaf.shape == shape:
            return shardings[name]
        if name is not None and shape is not None and len(shape) > 1 and {"v_row", "v_col"} & {*names}:
            axis = _averaged_axis(shape, rows="v_row" in names)
            if leaf.shape == shape[:axis] + shape[axis + 1 :]:
                spec = [*shardings[name].spec, *[None] * len(shape)][: len(shape)]
                return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        whose = "no parameter" if name is None else f"a parameter of shape {shape}"
        raise ValueError(
            f"the optimizer's state {'/'.join(names)} has shape {leaf.shape} and belongs to {whose}; no rule "
            "says how to shard it: an optimizer may hold arrays of the parameters' shapes, scalars, and the "
            "means v_row and v_col of optax.scale_by_factored_rms."
        )

    return jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(tx.init, trainable))


def _averaged_axis(shape: Sequence[int], rows: bool) -> int:
    """Returns the axis that `optax.scale_by_factored_rms` averages over: the longest (rows) or the second."""
    return int(np.argsort(shape)[-1 if rows else -2])


def final_params(state: TrainState, params: Flat) -> Flat:
    """Returns all parameters after a stage that began with `params`.

    Frozen ones are those of `params`, bit for bit, whatever dtype the state held them in: they are never read
    back from the devices. Trained ones are the average, if the stage keeps one.
    """
    return {**params, **(state.ema or state.trainable)}


def stage_seed(recipe: Recipe, stage: StageConfig) -> int:
    """Returns the seed of a stage's data, so that no stage repeats the documents of another."""
    return (recipe.seed << 32) + zlib.crc32(stage.name.encode())
