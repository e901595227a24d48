"""The notice that a run will be ended soon: SIGTERM, as spot TPUs, SLURM, Kubernetes and shells send it."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType, TracebackType

from jax.experimental import multihost_utils

from dreamllm_jax.distributed.coordination import is_multi_process

# JAX agrees on one of these numbers; they go on over the stages of a run, whose steps begin anew.
_sync_points = itertools.count(1)


class Preempted(Exception):
    """The run was asked to end, and what it had done is saved."""


class PreemptionGuard:
    """Within it a first SIGTERM does not end the process: the work sees it between two steps.

    With several processes JAX takes the signal (from `initialize` on) and tells the others.
    """

    def __init__(self) -> None:
        self._requested, self._previous = False, None

    def __enter__(self) -> PreemptionGuard:
        if not is_multi_process() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        self._restore_handler()

    def requested(self) -> bool:
        """Whether the run shall end here: the same answer on all processes; all ask after every step."""
        return (
            multihost_utils.reached_preemption_sync_point(next(_sync_points))
            if is_multi_process()
            else self._requested
        )

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore_handler()  # a second one ends at once

    def _restore_handler(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
