"""A profile of a few steps, by jax.profiler."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import Array

from dreamllm_jax.distributed import is_main
from dreamllm_jax.train.hooks.protocol import Hook, Log
from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState


class Profiler(Hook):
    """Traces steps `first` to `last` of a stage into `logs/profile`; process 0 traces its own devices.

    Open the folder with TensorBoard's profile plugin or with Perfetto (https://ui.perfetto.dev). Compiling is
    part of a run's first step, so begin later.
    """

    def __init__(self, first: int, last: int):
        self._first, self._last, self._is_tracing = first, last, False

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        self._folder = context.folder.logs / "profile"
        if int(state.step) + 1 == self._first:
            self._start()

    def is_due(self, step: int) -> bool:
        return step in (self._first - 1, self._last)

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        self._stop() if step == self._last else self._start()

    def after_stage(self) -> None:
        self._stop()

    def _start(self) -> None:
        if is_main() and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def _stop(self) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
