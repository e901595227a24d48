"""Joining the other processes, and ending a process that has joined them."""

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
    ProcessSpec,
    explicit_process,
    gpus_of_single_task,
    launcher_hint,
    mpi_detection_method,
    no_cluster_found,
)


def initialize(timeout_seconds: int = 300) -> None:
    """Joins the other processes, if there are any. A second call does nothing.

    Afterwards an uncaught exception ends this process at once, without waiting for the other processes. On
    several CPU devices, JAX's compilation cache is switched off.

    Raises:
      ValueError: the environment is incomplete or contradicts itself.
      TimeoutError: the other processes cannot be found or reached within `timeout_seconds`.
      RuntimeError: JAX was used before this call.
    """
    if not jax.distributed.is_initialized():
        _join(timeout_seconds)
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # CPU devices run the collectives of a cached program in no fixed order (JAX 0.10.2 and 0.12.0.1).
        # They then wait for each other forever, or gloo ends the process.
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
        raise _not_joined(error, process, timeout_seconds) from error
    except (ValueError, RuntimeError) as error:
        if process is None and hint is None and no_cluster_found(error, os.environ):
            return
        if isinstance(error, RuntimeError) and "must be called before" in str(error):
            raise
        if isinstance(error, RuntimeError):  # a host name or a service did not answer in time
            raise TimeoutError(
                f"{first_line(error)}: the host of process 0 was not found within {timeout_seconds} s; start "
                "all hosts, and check that each can resolve the name of the first one."
            ) from error
        mpi = hint is not None and hint.startswith(("OMPI", "PMI"))
        how = "install mpi4py" if mpi else "start them with srun or mpirun"
        raise ValueError(
            f"{hint or 'The environment'} says that there are several processes, but not how to reach them "
            f"({first_line(error)}); {how}, or {EXPLICIT} for each, or {COUNT}=1 for a single process."
        ) from error
    sys.excepthook = _exit_on_exception


def _not_joined(error: Exception, process: ProcessSpec | None, timeout_seconds: int) -> TimeoutError:
    everyone = (
        "the other processes" if process is None else f"all {process.count} processes at {process.address}"
    )
    return TimeoutError(
        f"{first_line(error)}: {everyone} did not join within {timeout_seconds} s; start every one of them, "
        "and check that each host can reach the address."
    )


def exit_process(code: int) -> None:
    """Ends this process with an exit code, without waiting for work of the other processes."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # most errors occur on all processes: end together
        client().wait_at_barrier("leaving", 5000)
    if jax.process_index() == 0:
        time.sleep(0.5)  # the coordinator ends last: without it, the others would end with long error traces
    os._exit(code)


def _exit_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    exit_process(1)


def client() -> Any:
    """Returns JAX's client of the coordinator.

    Raises:
      RuntimeError: `initialize` was not called.
    """
    # JAX has no public barrier with a chosen timeout. orbax uses the same private client.
    from jax._src import distributed

    found = distributed.global_state.client
    if found is None:
        raise RuntimeError(
            "Several processes need dreamllm_jax.distributed.initialize() before any use of JAX."
        )
    return found


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without its final punctuation."""
    return str(error).strip().split("\n")[0].rstrip(".:")
