"""The train step: one jitted function from (state, batch) to (state, metrics)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.train import StageConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import match_rule, parameter_spec, platform
from dreamllm_jax.train.objectives import OBJECTIVES, LossCounts, loss_counts, sample_noise
from dreamllm_jax.train.optim import make_optimizer
from dreamllm_jax.train.state import TrainState


def row_prng_keys(key: Array, step: Array, rows: int) -> Array:
    """One key per row of the global batch: a function of (seed, step, row) alone."""
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
    """The stage's objective on some rows of the batch, as their share of the global mean."""
    step_noise = sample_noise(keys, batch.dream_mask.shape[1], model.config, stage.loss)
    params = unflatten_dict({**frozen, **trainable}, sep="/")
    return OBJECTIVES[stage.objective](model, params, batch, step_noise, stage.loss, counts)


def cast_for_compute(params: Flat, model: DreamLLMModule, gathered: bool, sliced: bool = True) -> Flat:
    """What a step computes with: matrices in the model's dtype, and whole along fsdp where `gathered`.

    They are cast here, once, and before they travel: half the bytes. Vectors stay as they are. Not all are
    `sliced` along fsdp where a mesh keeps some whole: then what is `gathered` is not pinned to slices first.
    """
    dtype, mesh = jnp.dtype(model.config.dtype), jax.sharding.get_abstract_mesh()

    def one(path: str, x: Array) -> Array:
        if not match_rule(path)[1] or (x.dtype == dtype and not gathered):
            return x
        if x.dtype != dtype:
            x = x.astype(dtype)
            if not mesh.empty and (sliced or not gathered):  # else XLA gathers first and casts then
                x = jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, mesh))
        if gathered and not mesh.empty:
            x = jax.lax.with_sharding_constraint(x, parameter_spec(path, x.shape, mesh, gathered))
        return x

    return {path: one(path, x) for path, x in params.items()}


def gradients(
    trainable: Flat, frozen: Flat, batch: Batch, keys: Array, model: DreamLLMModule, stage: StageConfig
) -> tuple[Flat, dict[str, Array]]:
    """Gradients (float32, laid out as the parameters) and metrics of the whole batch.

    It goes in `grad_accum_steps` micro-batches. Micro-batch a takes rows a, a + A, a + 2A, ...: each device
    keeps its own rows.
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
        return {k: _as_parameter(k, g) for k, g in grads.items()}, metrics

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


def _as_parameter(path: str, gradient: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = parameter_spec(path, gradient.shape, mesh)
        gradient = jax.lax.with_sharding_constraint(gradient, spec)
    if platform() == "tpu":
        # Else XLA would sum gradients of micro-batches before it scatters them, whole on every device, and
        # ends at that with an internal error: where data is 1 and the compiler takes its full effort.
        gradient = jax.lax.optimization_barrier(gradient)
    return gradient.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "stage"), donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, rate: Float[Array, ""], *, model: DreamLLMModule, stage: StageConfig
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step of a stage at learning rate `rate`; the state is donated.

    Pass `stage.compile_key()`, so that stages with the same program share it.

    Frozen parameters take part in the forward pass and conduct gradients, but receive none.
    """
    keys = row_prng_keys(jax.random.wrap_key_data(state.key), state.step, batch.tokens.shape[0])
    grads, metrics = gradients(state.trainable, state.frozen, batch, keys, model, stage)
    updates, opt_state = make_optimizer(stage.optim).update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, updates)
    ema = state.ema
    if stage.optim.ema_decay:
        # Early on a shorter average, so that the random beginning is forgotten.
        decay = jnp.minimum(stage.optim.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(trainable, ema, 1.0 - decay)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": rate,
        "tokens": batch.loss_weights.sum(),
        "dreams": batch.dream_mask.sum(),
    }
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema), metrics
