"""What processes do together: agree, wait, look, fetch what lies on the devices of all; and speak once.

What one must know of the others travels over the devices: all processes make these calls, in one order.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.distributed.initialization import client, first_line

# A process that is gone is noticed within minutes; one that is slow (it writes 26 GB) is waited for.
_PATIENCE_SECONDS = 24 * 3600

_barrier_ids = itertools.count()


def is_main() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def print_on_main(*words: object) -> None:
    """Prints a line, once for all processes."""
    if is_main():
        print(*words, flush=True)


def barrier(name: str) -> None:
    """Waits until all processes are here. Not over the devices: those wait half a minute at most on CPUs.

    Raises:
      OSError: the others did not come within a day, or one of them has ended.
    """
    if not is_multi_process():
        return
    try:
        client().wait_at_barrier(f"{name} {next(_barrier_ids)}", _PATIENCE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            f"process {jax.process_index()} waited for the others ({name}): {first_line(error)}."
        ) from error


def all_gather(value: Any) -> list[Any]:
    """Every process's value (anything of JSON) in the order of the processes, on all of them."""
    if not is_multi_process():
        return [value]
    barrier("gather")
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_main(value: Any) -> Any:
    """Process 0's value (anything of JSON), on all processes: decisions are made there."""
    return all_gather(value)[0]


def sum_over_processes(numbers: Sequence[int]) -> list[int]:
    """Numbers added up over all processes."""
    return [sum(column) for column in zip(*all_gather(list(numbers)), strict=True)]


def check_equal_on_processes(what: str, text: str) -> None:
    """Checks that all processes were given the same.

    Raises:
      ValueError: they were not.
    """
    theirs = all_gather(text)
    other = [i for i, found in enumerate(theirs) if found != theirs[0]]
    if other:
        raise ValueError(
            f"{_list_processes(other)} had another {what} than process 0; start all of them with the same "
            "command and the same files."
        )


def check_shared_folder(folder: Path, wait_seconds: float = 10) -> None:
    """Makes a folder, and checks that all processes see in it what process 0 writes.

    Raises:
      ValueError: some do not.
      OSError: process 0 cannot write there.
    """
    if not is_multi_process():
        return
    token, problem = folder / f".shared-{broadcast_from_main(uuid.uuid4().hex)}", None
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text("written by process 0\n", encoding="utf-8")
        except OSError as error:
            problem = str(error)
    if problem := broadcast_from_main(problem):
        raise OSError(f"process 0 cannot write into {folder}: {problem}.")
    blind = [i for i, seen in enumerate(all_gather(_appears(token, wait_seconds))) if not seen]
    if is_main():
        token.unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"{folder} is not one folder for all processes: {_list_processes(blind)} cannot see what "
            "process 0 wrote there; give a folder on a filesystem that all hosts share."
        )


def wait_for_file(path: Path, wait_seconds: float = 60) -> None:
    """Waits until a file that process 0 wrote can be seen here: network filesystems may take their time.

    Raises:
      OSError: it cannot be seen even then.
    """
    if is_multi_process() and not _appears(path, wait_seconds):
        raise OSError(f"process {jax.process_index()} cannot see {path}, which process 0 has written.")


def _appears(path: Path, wait_seconds: float) -> bool:
    end = time.monotonic() + wait_seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _list_processes(processes: Sequence[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


def spans_processes(x: Any) -> bool:
    """Whether no process holds all of an array: reading it is every process's business."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def to_host(x: Any, start: int | None = None, stop: int | None = None) -> np.ndarray:
    """An array (or its rows from `start` to `stop`) as numpy, on all processes.

    Where `spans_processes` every process calls this, in the same order; only what is asked for is gathered.
    """
    whole = start is None and stop is None
    if not spans_processes(x):
        x = x.addressable_data(0) if isinstance(x, jax.Array) and not x.is_fully_addressable else x
        return np.asarray(x if whole else x[start:stop])
    start, stop, _ = slice(start, stop).indices(x.shape[0] if x.ndim else 1)
    size = None if whole else stop - start
    everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
    return np.asarray(_rows(x, start, size=size, sharding=everywhere).addressable_data(0))


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _rows(x: jax.Array, start: int, *, size: int | None, sharding: NamedSharding) -> jax.Array:
    rows = x if size is None else jax.lax.dynamic_slice_in_dim(x, start, size)
    return jax.lax.with_sharding_constraint(rows, sharding)
