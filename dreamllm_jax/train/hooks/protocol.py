"""The protocol of hooks, and the list of hooks that a stage runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from jax import Array

from dreamllm_jax.train.stage_context import StageContext
from dreamllm_jax.train.state import TrainState


class Record(NamedTuple):
    """Numbers of one step. `series` names their kind: "curves", "speed", "validation", or a hook's own."""

    series: str
    step: int
    values: Mapping[str, float]


# Sends a record to all hooks of the stage, the loggers among them.
Log = Callable[[Record], None]


class Hook:
    """Runs beside the steps of a stage. A hook overrides the methods that it needs; the others do nothing.

    Every process calls every method, in the same order, so that a hook may use collectives. A hook that
    writes files does so on process 0 (`distributed.is_main()`), into `context.folder`. It must not change the
    state.

    Example, a hook that stops a run without progress:

        class Patience(Hook):
            def log(self, record):
                if record.series == "validation" and record.step > 1000 and record.values["loss"] > 5:
                    raise ValueError(f"Validation loss {record.values['loss']} after step {record.step}.")
    """

    def before_stage(self, context: StageContext, state: TrainState, log: Log) -> None:
        """Called once, before the first step (after a restart: before the first that is left)."""

    def is_due(self, step: int) -> bool:
        """Returns whether `after_step` is called after this step (counted from 1)."""
        return False

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        """Called after a step that `is_due`, when it is finished and logged.

        It is not called for the step after which a run is preempted. `state` and `metrics` (scalars) are on
        the devices. The next step donates `state`: keep no reference. The time that this takes does not count
        in the throughput.
        """

    def log(self, record: Record) -> None:
        """Called for every record that the loop (every `log_every` steps) or a hook sends."""

    def after_stage(self) -> None:
        """Called once, after the last step, or when an error or a preemption ends the stage early."""


class HookList:
    """The hooks of a stage, called in order."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks, self._stack = list(hooks), ExitStack()

    def before_stage(self, context: StageContext, state: TrainState) -> None:
        """Starts every hook. `close` ends those that were started."""
        for hook in self._hooks:
            self._stack.callback(hook.after_stage)
            hook.before_stage(context, state, self.log)

    def is_due(self, step: int) -> bool:
        """Returns whether any hook is due after this step."""
        return any(hook.is_due(step) for hook in self._hooks)

    def after_step(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> None:
        """Runs the hooks that are due."""
        for hook in self._hooks:
            if hook.is_due(step):
                hook.after_step(step, state, metrics)

    def log(self, record: Record) -> None:
        """Sends a record to every hook."""
        for hook in self._hooks:
            hook.log(record)

    def close(self) -> None:
        """Ends the hooks in reverse order, all of them even if one fails."""
        self._stack.close()
