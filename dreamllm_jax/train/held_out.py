"""The losses of a stage on held-out batches, for the validation hook and for `dreamllm evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import process_row_indices, shard_batch
from dreamllm_jax.train.objectives import LossCounts
from dreamllm_jax.train.step import (
    cast_for_compute,
    compile_on_all_processes,
    loss_and_metrics,
    row_prng_keys,
)


def held_out_seed(recipe: Recipe, stage: StageConfig) -> int:
    """Returns the seed of the held-out documents: different from that of every stage's documents."""
    return (recipe.seed << 32) + zlib.crc32(f"validation of {stage.name}".encode())


def with_fewer_rows(stage: StageConfig) -> DataConfig:
    """Returns the stage's data in batches of one micro-batch, `grad_accum_steps` times fewer rows."""
    return dataclasses.replace(stage.data, batch_size=stage.data.batch_size // stage.optim.grad_accum_steps)


class HeldOutBatches:
    """Some batches of `data`, and the stage's losses on them.

    The batches and their noise are the same each time, so that the losses of different parameters can be
    compared. Losses are sums over the counts of all batches together, as if these were one.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        config: DreamLLMConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        data: DataConfig,
        number: int,
        index: Path | None,
    ):
        """Reads `number` batches. `index` is the folder of the tars' indexes (see `prepare_index`)."""
        seed = held_out_seed(recipe, stage)
        self._mesh, self._stage, self._rows = mesh, stage.compile_key(), data.batch_size
        self._model, self._compiled = DreamLLMModule(config), False
        stream = batches(
            data,
            config,
            tokenizer,
            seed=seed,
            null_dream=stage.loss.condition_dropout > 0,
            row_indices=process_row_indices(mesh, data.batch_size),
            index_folder=index,
        )
        try:
            self._batches = [next(stream) for _ in range(number)]
        finally:
            stream.close()
        self._key = jax.random.fold_in(jax.random.key(recipe.seed), seed % 2**32)
        sums = [[float(np.asarray(x)) for x in _sums(self._shard(batch))] for batch in self._batches]
        self.tokens, self.dreams, self.rows = (sum(column) for column in zip(*sums, strict=True))
        counts = (jnp.float32(max(n, 1.0)) for n in (self.tokens, self.dreams, self.rows))
        self._counts = LossCounts(*counts)

    def losses(self, trainable: Flat, frozen: Flat) -> dict[str, float]:
        """Returns the metrics of the stage's objective on all batches; call it with the mesh set."""
        totals: defaultdict[str, float] = defaultdict(float)
        options = {"model": self._model, "stage": self._stage}
        for number, batch in enumerate(self._batches):
            keys = row_prng_keys(self._key, jnp.int32(number), self._rows)
            args = (trainable, frozen, self._shard(batch), keys, self._counts)
            if not self._compiled:
                compile_on_all_processes(held_out_metrics, *args, **options)
                self._compiled = True
            for name, value in held_out_metrics(*args, **options).items():
                totals[name] += float(np.asarray(value))
        return dict(totals)

    def _shard(self, batch: Batch) -> Batch:
        return shard_batch(batch, self._mesh, self._rows)


@jax.jit
def _sums(batch: Batch) -> tuple[Array, Array, Array]:
    """Returns the batch's supervised tokens, dreams and rows."""
    rows = jnp.float32(batch.tokens.shape[0])
    return batch.loss_weights.sum(), batch.dream_mask.sum().astype(jnp.float32), rows


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def held_out_metrics(
    trainable: Flat,
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
    trainable = cast_for_compute(trainable, model, gathered)
    frozen = cast_for_compute(frozen, model, gathered, sliced=False)
    model = model.clone(tables_gathered=gathered)
    return loss_and_metrics(trainable, frozen, batch, keys, counts, model, stage)[1]
