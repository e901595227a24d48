"""The validation loss: the stage's objective on held-out batches."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.hooks import HooksConfig
from dreamllm_jax.config.train import StageConfig
from dreamllm_jax.train.held_out import HeldOutBatches, with_fewer_rows
from dreamllm_jax.train.hooks.protocol import Hook, Log, Record
from dreamllm_jax.train.preparation import prepare_index
from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState


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
    return with_fewer_rows(stage)


class ValidationLoss(Hook):
    """Logs the stage's loss on held-out batches as the series "validation".

    The parameters are those that would be saved: the average, if there is one. See `HeldOutBatches`.
    """

    def __init__(self, config: HooksConfig):
        assert config.eval_every is not None
        self._config, self._every = config, config.eval_every

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        data = validation_data(self._config, context.stage)
        prepare_index(data, context.index)
        self._steps, self._log = context.stage.steps, log
        self._held_out = HeldOutBatches(
            context.recipe,
            context.stage,
            context.config,
            context.tokenizer,
            context.mesh,
            data,
            self._config.eval_batches,
            context.index,
        )

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        losses = self._held_out.losses(state.ema or state.trainable, state.frozen)
        self._log(Record("validation", step, losses))
