"""The validation loss: the stage's objective on held-out batches."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.hooks import HooksConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import process_row_indices, shard_batch
from dreamllm_jax.train.hooks.protocol import Hook, Log, Record
from dreamllm_jax.train.objectives import LossCounts
from dreamllm_jax.train.preparation import prepare_index
from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState
from dreamllm_jax.train.step import (
    cast_for_compute,
    compile_on_all_processes,
    loss_and_metrics,
    row_prng_keys,
)


def validation_data(config: HooksConfig, stage: StageConfig) -> DataConfig:
    """Returns the data of the held-out batches.

    Raises:
      ValueError: `validation` is not set, and the stage reads files, of which none are held out.
    """
    if config.validation is not None:
        return config.validation
    if stage.data.sources:
        raise ValueError(
            "hooks.eval_every needs held-out data, and the stage reads files; set hooks.validation to data "
            "from other files."
        )
    rows = stage.data.batch_size // stage.optim.grad_accum_steps
    return dataclasses.replace(stage.data, batch_size=rows)


def validation_seed(recipe: Recipe, stage: StageConfig) -> int:
    """Returns the seed of the held-out documents: another one than that of any stage's documents."""
    return (recipe.seed << 32) + zlib.crc32(f"validation of {stage.name}".encode())


class ValidationLoss(Hook):
    """Logs the stage's loss on held-out batches as the series "validation".

    The batches and their noise are the same each time, so that values of different steps can be compared. The
    parameters are those that would be saved: the average, if there is one. Losses are sums over the counts of
    all held-out batches together, as if these were one.
    """

    def __init__(self, config: HooksConfig):
        assert config.eval_every is not None
        self._config, self._every = config, config.eval_every

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        self._context, self._log, self._compiled = context, log, False
        stage, data = context.stage, validation_data(self._config, context.stage)
        self._rows, seed = data.batch_size, validation_seed(context.recipe, stage)
        prepare_index(data, context.index)
        stream = batches(
            data,
            context.config,
            context.tokenizer,
            seed=seed,
            null_dream=stage.loss.condition_dropout > 0,
            numbers=process_row_indices(context.mesh, data.batch_size),
            index_folder=context.index,
        )
        try:
            self._batches = [next(stream) for _ in range(self._config.eval_batches)]
        finally:
            stream.close()
        self._key = jax.random.fold_in(jax.random.key(context.recipe.seed), seed % 2**32)
        sums = [[float(np.asarray(x)) for x in _sums(self._shard(batch))] for batch in self._batches]
        self._counts = LossCounts(*(jnp.float32(max(sum(column), 1.0)) for column in zip(*sums, strict=True)))

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._context.stage.steps

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        key = self._context.stage.compile_key()
        params = state.ema or state.trainable
        totals: dict[str, float] = {}
        for number, batch in enumerate(self._batches):
            keys = row_prng_keys(self._key, jnp.int32(number), self._rows)
            args = (params, state.frozen, self._shard(batch), keys, self._counts)
            if not self._compiled:
                compile_on_all_processes(validation_metrics, *args, model=self._context.model, stage=key)
                self._compiled = True
            found = validation_metrics(*args, model=self._context.model, stage=key)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + float(np.asarray(value))
        self._log(Record("validation", step, totals))

    def _shard(self, batch: Batch) -> Batch:
        return shard_batch(batch, self._context.mesh, self._rows)


@jax.jit
def _sums(batch: Batch) -> tuple[Array, Array, Array]:
    """The batch's supervised tokens, dreams and rows."""
    rows = jnp.float32(batch.tokens.shape[0])
    return batch.loss_weights.sum(), batch.dream_mask.sum().astype(jnp.float32), rows


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def validation_metrics(
    params: Flat,
    frozen: Flat,
    batch: Batch,
    keys: Array,
    counts: LossCounts,
    *,
    model: DreamLLMModule,
    stage: StageConfig,
) -> dict[str, Array]:
    """Returns the metrics of the stage's objective on one batch, as its share of all that `counts` counts."""
    gathered = stage.optim.gather == "step"
    params = cast_for_compute(params, model, gathered)
    frozen = cast_for_compute(frozen, model, gathered, sliced=False)
    model = model.clone(tables_gathered=gathered)
    return loss_and_metrics(params, frozen, batch, keys, counts, model, stage)[1]
