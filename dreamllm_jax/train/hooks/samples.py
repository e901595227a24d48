"""Sample documents: what the model writes for fixed prompts in the course of training."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from dreamllm_jax import distributed
from dreamllm_jax.config.hooks import HooksConfig
from dreamllm_jax.train.hooks.protocol import Hook, Log
from dreamllm_jax.train.stage_context import MakeWriter, StageContext
from dreamllm_jax.train.state import TrainState


class SampleDocuments(Hook):
    """Writes `samples/step_<step>/<number of the prompt>.html` in the stage's folder.

    The seed is always the recipe's, so that samples of different steps can be compared. Settings are the
    recipe's `generation`.
    """

    def __init__(self, config: HooksConfig, make_writer: MakeWriter):
        assert config.sample_every is not None
        self._every, self._prompts, self._make_writer = (
            config.sample_every,
            config.sample_prompts,
            make_writer,
        )

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        self._context = context

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._context.stage.steps

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        context, recipe = self._context, self._context.recipe
        params = {**state.frozen, **(state.ema or state.trainable)}
        writer = self._make_writer(
            context.config,
            params,
            context.tokenizer,
            recipe.generation,
            context.mesh,
            recipe.mesh.replicated,
        )
        documents = writer.generate_document(list(self._prompts), seed=recipe.seed)
        if distributed.is_main():
            folder = context.folder.samples / f"step_{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for number, document in enumerate(documents):
                document.save_html(folder / f"{number}.html")
