"""The train step: one jitted function from (state, batch) to (state, metrics)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from dreamllm_jax import distributed
from dreamllm_jax.batch import Batch
from dreamllm_jax.config.train import StageConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import match_rule, parameter_spec, platform
from dreamllm_jax.train.objectives import OBJECTIVES, LossCounts, loss_counts, sample_noise
from dreamllm_jax.train.optim import make_optimizer
from dreamllm_jax.train.state import TrainState


def row_prng_keys(key: Array, step: Array, rows: int) -> Array:
    """Returns one key per row of the global batch, a function of (seed, step, row) alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(rows))


def loss_and_metrics(
    trainable: Flat,
    frozen: Flat,
    batch: Batch,
    keys: Array,
    counts: LossCounts,
    model: DreamLLMModule,
    stage: StageConfig,
) -> tuple[Array, dict[str, Array]]:
    """Returns (loss, metrics) of the stage's objective on some rows, as their share of the global mean."""
    step_noise = sample_noise(keys, batch.dream_mask.shape[1], model.config, stage.loss)
    params = unflatten_dict({**frozen, **trainable}, sep="/")
    return OBJECTIVES[stage.objective](model, params, batch, step_noise, stage.loss, counts)


def cast_for_compute(params: Flat, model: DreamLLMModule, gathered: bool, sliced: bool = True) -> Flat:
    """Returns the parameters that a step computes with: matrices in the model's dtype, vectors unchanged.

    `gathered` replicates the matrices along fsdp. They are cast before that, which halves the bytes that are
    communicated. `sliced=False` says that the mesh replicates some parameters already: a matrix that is to be
    `gathered` is then not constrained to a slice first.
    """
    dtype, mesh = jnp.dtype(model.config.dtype), jax.sharding.get_abstract_mesh()

    def cast_one(path: str, x: Array) -> Array:
        if not match_rule(path)[1] or (x.dtype == dtype and not gathered):
            return x
        if x.dtype != dtype:
            x = x.astype(dtype)
            if not mesh.empty and (sliced or not gathered):  # or XLA would gather first and then cast
                x = jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, mesh))
        if gathered and not mesh.empty:
            x = jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, mesh, gathered))
        return x

    return {path: cast_one(path, x) for path, x in params.items()}


def gradients(
    trainable: Flat, frozen: Flat, batch: Batch, keys: Array, model: DreamLLMModule, stage: StageConfig
) -> tuple[Flat, dict[str, Array]]:
    """Returns gradients (float32, sharded as the parameters) and metrics of the batch.

    The batch is divided into A = `grad_accum_steps` micro-batches. Micro-batch a has rows a, a + A, a + 2A,
    ..., so that rows do not move between devices. With 8 rows on 2 devices and A = 2, the first device holds
    rows 0..3 and computes rows 0 and 2, then rows 1 and 3.
    """
    counts, parts = loss_counts(batch), stage.optim.grad_accum_steps
    gathered = stage.optim.gather == "step"
    params = cast_for_compute(trainable, model, gathered)
    frozen = cast_for_compute(frozen, model, gathered, sliced=False)
    model = model.clone(tables_gathered=gathered)

    def grad(batch: Batch, keys: Array) -> tuple[Flat, dict[str, Array]]:
        grads, metrics = jax.grad(loss_and_metrics, has_aux=True)(
            params, frozen, batch, keys, counts, model, stage
        )
        return {k: _as_parameter_gradient(k, g) for k, g in grads.items()}, metrics

    if parts == 1:
        return grad(batch, keys)

    def split(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def body(carry, x):
        return jax.tree.map(jnp.add, carry, grad(*x)), None

    micro = jax.tree.map(split, (batch, keys))
    shapes = jax.eval_shape(lambda x: grad(*jax.tree.map(lambda y: y[0], x)), micro)
    total, _ = jax.lax.scan(body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro)
    return total


def _as_parameter_gradient(path: str, gradient: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = parameter_spec(path, gradient.shape, mesh)
        gradient = jax.lax.with_sharding_constraint(gradient, spec)
    if platform() == "tpu":
        # Without the barrier XLA sums the gradients of micro-batches unsharded before it scatters them, and
        # fails with an internal error if the mesh axis data is 1 and the compiler's effort is at its maximum.
        gradient = jax.lax.optimization_barrier(gradient)
    return gradient.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "stage"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, rate: Float[Array, ""], *, model: DreamLLMModule, stage: StageConfig
) -> tuple[TrainState, dict[str, Array]]:
    """Returns the state and metrics after one optimizer step at learning rate `rate`. The state is donated.

    Pass `stage.compile_key()` as `stage`, so that stages with the same program share it. Gradients pass
    through frozen parameters, which have none themselves.
    """
    keys = row_prng_keys(jax.random.wrap_key_data(state.key), state.step, batch.tokens.shape[0])
    grads, metrics = gradients(state.trainable, state.frozen, batch, keys, model, stage)
    updates, opt_state = make_optimizer(stage.optim).update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, updates)
    ema = state.ema
    if stage.optim.ema_decay:
        # The average is shorter at first, so that it forgets the initial values.
        decay = jnp.minimum(stage.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(trainable, ema, 1.0 - decay)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": rate,
        "tokens": batch.loss_weights.sum(),
        "dreams": batch.dream_mask.sum(),
    }
    state = dataclasses.replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema)
    return state, metrics


def compile_on_all_processes(function: Any, *args: Any, **options: Any) -> None:
    """Compiles a jitted function for these arguments on every process before any process runs it.

    Compilation takes each process a different time, and on CPUs a collective waits 30 s at most. A single
    process compiles when it calls the function.
    """
    if distributed.is_multi_process():
        function.lower(*args, **options).compile()
        distributed.barrier("compiled")
