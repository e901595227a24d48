"""Preemption: handles the SIGTERM with which spot TPUs, SLURM, Kubernetes or a shell ends a run."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType, TracebackType

from jax.experimental import multihost_utils

from dreamllm_jax.distributed.coordination import is_multi_process

# JAX compares these numbers between processes. They must keep growing, so stages share one counter.
_sync_points = itertools.count(1)


class Preempted(Exception):
    """The run was asked to end, and its state is saved."""


class PreemptionGuard:
    """A context in which the first SIGTERM sets a flag and does not end the process.

    The work checks `requested` between two steps. A second SIGTERM ends the process at once. With several
    processes JAX handles the signal (from `initialize` on) and informs the other processes.
    """

    def __init__(self) -> None:
        self._requested, self._previous = False, None

    def __enter__(self) -> PreemptionGuard:
        if not is_multi_process() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._restore_handler()

    def requested(self) -> bool:
        """Returns whether the run was asked to end: the same answer on all processes.

        Every process must call this after every step.
        """
        if is_multi_process():
            return multihost_utils.reached_preemption_sync_point(next(_sync_points))
        return self._requested

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
