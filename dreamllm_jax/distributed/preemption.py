"""The notice that a run will be ended soon: SIGTERM, as spot TPUs, SLURM, Kubernetes and shells send it."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType, TracebackType

from jax.experimental import multihost_utils

from dreamllm_jax.distributed.coordination import several

# JAX agrees on one of these numbers; they go on over the stages of a run, whose steps begin anew.
_looks = itertools.count(1)


class Preempted(Exception):
    """The run was asked to end, and what it had done is saved."""


class PreemptionGuard:
    """Within it a first SIGTERM does not end the process: the work sees it between two steps.

    With several processes JAX takes the signal (from `initialize` on) and tells the others.
    """

    def __init__(self) -> None:
        self._requested, self._before = False, None

    def __enter__(self) -> PreemptionGuard:
        if not several() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        self._give_back()

    def requested(self) -> bool:
        """Whether the run shall end here: the same answer on all processes; all ask after every step."""
        return multihost_utils.reached_preemption_sync_point(next(_looks)) if several() else self._requested

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._give_back()  # a second one ends at once

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
