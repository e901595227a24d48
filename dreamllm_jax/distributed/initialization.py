"""Joining the other processes, and leaving them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from types import TracebackType
from typing import Any

import jax

from dreamllm_jax.distributed.environment import (
    COUNT,
    EXPLICIT,
    explicit_process,
    gpus_of_single_task,
    launcher_hint,
    mpi_detection_method,
    no_cluster_found,
)


def initialize(timeout_seconds: int = 300) -> None:
    """Joins the other processes, if there are any; a second call does nothing.

    From then on an error that nobody catches ends this process at once, without waiting for the others. Where
    there are several CPU devices no program is taken from JAX's compilation cache.

    Raises:
      ValueError: the environment is incomplete or contradicts itself.
      TimeoutError: the others cannot be found or reached within `timeout_seconds`.
      RuntimeError: JAX was used before, so that it is too late.
    """
    if not jax.distributed.is_initialized():
        _join(timeout_seconds)
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # Devices run the collectives of a program that was loaded in any order (JAX 0.10.2 and 0.12.0.1), and
        # wait for each other for ever; or gloo ends the process.
        jax.config.update("jax_enable_compilation_cache", False)


def _join(timeout_seconds: int) -> None:
    process, hint = explicit_process(os.environ), launcher_hint(os.environ)
    if process is not None and process.count == 1:
        return
    try:
        if process is not None:
            jax.distributed.initialize(
                *process, cluster_detection_method="deactivate", initialization_timeout=timeout_seconds
            )
        else:
            jax.distributed.initialize(
                cluster_detection_method=mpi_detection_method(os.environ),
                local_device_ids=gpus_of_single_task(os.environ),
                initialization_timeout=timeout_seconds,
            )
    except jax.errors.JaxRuntimeError as error:
        whole = (
            "the other processes"
            if process is None
            else f"all {process.count} processes at {process.address}"
        )
        raise TimeoutError(
            f"{first_line(error)}: {whole} did not come together within {timeout_seconds} s; "
            "start every one of them, and look whether the address can be reached from each host."
        ) from error
    except (ValueError, RuntimeError) as error:
        if process is None and hint is None and no_cluster_found(error, os.environ):
            return
        if isinstance(error, RuntimeError) and "must be called before" in str(error):
            raise
        if isinstance(error, RuntimeError):  # a name or a service of the cluster that did not answer in time
            raise TimeoutError(
                f"{first_line(error)}: the host where the others meet was not found within {timeout_seconds} "
                "s; start all hosts, and look whether each can find the first one by its name."
            ) from error
        mpi = hint is not None and hint.startswith(("OMPI", "PMI"))
        how = "install mpi4py" if mpi else "start them with srun or mpirun"
        raise ValueError(
            f"{hint or 'The environment'} says that there are several processes, but not how to reach them "
            f"({first_line(error)}); {how}, or {EXPLICIT} for each, or {COUNT}=1 for one process alone."
        ) from error
    sys.excepthook = _exit_on_exception


def exit_process(code: int) -> None:
    """Ends this process with an exit code; an error here does not wait for what the others are doing."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush(), sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # most errors are everyone's: end together
        client().wait_at_barrier("leaving", 5000)
    if jax.process_index() == 0:
        time.sleep(0.5)  # when the coordinator is gone, who is still there is ended with noise
    os._exit(code)


def _exit_on_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    traceback.print_exception(kind, error, where)
    exit_process(1)


def client() -> Any:
    """JAX's client of the processes' coordinator."""
    # JAX has no public barrier that waits as long as it is told to; orbax reaches for the same one.
    from jax._src import distributed

    found = distributed.global_state.client
    if found is None:
        raise RuntimeError(
            "Several processes need dreamllm_jax.distributed.initialize() before any use of JAX."
        )
    return found


def first_line(error: Exception) -> str:
    """What an error says, without its details."""
    return str(error).strip().split("\n")[0].rstrip(".:")
