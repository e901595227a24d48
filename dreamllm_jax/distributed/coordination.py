"""What processes do together: wait, agree on values, and read arrays that span their devices.

Values travel over the devices. All processes must therefore make these calls, in the same order.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.distributed.initialization import client, first_line

T = TypeVar("T")

# A process that has ended is noticed within minutes. A slow one, for example while it writes 26 GB, is
# waited for.
_BARRIER_TIMEOUT_SECONDS = 24 * 3600

_barrier_ids = itertools.count()


def is_main() -> bool:
    """Returns whether this is process 0, which prints and writes files."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Returns whether there is more than one process."""
    return jax.process_count() > 1


def print_on_main(*values: object) -> None:
    """Prints a line on process 0 only."""
    if is_main():
        print(*values, flush=True)


def barrier(name: str) -> None:
    """Waits until every process has reached this call; `name` appears in the error message.

    The coordinator's barrier is used, not a collective over devices: on CPUs a collective waits half a minute
    at most.

    Raises:
      OSError: a process did not arrive within a day, or has ended.
    """
    if not is_multi_process():
        return
    try:
        client().wait_at_barrier(f"{name} {next(_barrier_ids)}", _BARRIER_TIMEOUT_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            f"process {jax.process_index()} waited for the others ({name}): {first_line(error)}."
        ) from error


def all_gather(value: Any) -> list[Any]:
    """Returns every process's value, in the order of the processes, on all of them.

    Values are JSON: process 0 with `"a"` and process 1 with `[1]` both get `["a", [1]]`.
    """
    if not is_multi_process():
        return [value]
    barrier("all_gather")
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
    # Each size is compiled once, so sizes are rounded up to a power of two.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: text.size] = text
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(gathered, sizes, strict=True)]


def broadcast_from_main(value: T) -> T:
    """Returns process 0's value (JSON) on all processes, for decisions that process 0 makes."""
    return all_gather(value)[0]


def run_on_main(function: Callable[[], T]) -> T:
    """Calls a function on process 0 only; returns its result (JSON) on all processes.

    Raises:
      ValueError, OSError: as the function did on process 0, with the same message on all processes.
    """
    result: Any = None
    message, is_os_error = None, False
    if is_main():
        try:
            result = function()
        except (ValueError, OSError) as error:
            if not is_multi_process():
                raise
            message, is_os_error = str(error), isinstance(error, OSError)
    result, message, is_os_error = broadcast_from_main([result, message, is_os_error])
    if message is not None:
        raise (OSError if is_os_error else ValueError)(message)
    return result


def sum_over_processes(numbers: Sequence[int]) -> list[int]:
    """Returns the elementwise sum over all processes: [1, 2] and [3, 4] give [4, 6] on both."""
    return [sum(column) for column in zip(*all_gather(list(numbers)), strict=True)]


def check_equal_on_processes(what: str, text: str) -> None:
    """Checks that all processes pass the same text.

    Raises:
      ValueError: a process passes another text than process 0. It is raised on all processes.
    """
    texts = all_gather(text)
    different = [i for i, other in enumerate(texts) if other != texts[0]]
    if different:
        raise ValueError(
            f"{_list_processes(different)} had a different {what} from process 0; start all of them with the "
            "same command and the same files."
        )


def check_shared_folder(folder: Path, wait_seconds: float = 10) -> None:
    """Creates a folder and checks that all processes see a file that process 0 writes into it.

    Raises:
      ValueError: a process does not see the file.
      OSError: process 0 cannot write into the folder.
    """
    if not is_multi_process():
        return
    token = folder / f".shared-{broadcast_from_main(uuid.uuid4().hex)}"
    run_on_main(functools.partial(_write_token, token))
    seen = all_gather(_appears(token, wait_seconds))
    if is_main():
        token.unlink(missing_ok=True)
    if blind := [i for i, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"{folder} is not one folder for all processes: {_list_processes(blind)} cannot see what "
            "process 0 wrote there; give a folder on a filesystem that all hosts share."
        )


def _write_token(token: Path) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("written by process 0\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"process 0 cannot write into {token.parent}: {error}.") from error


def wait_for_file(path: Path, wait_seconds: float = 60) -> None:
    """Waits until this process sees a file that process 0 wrote; network filesystems may show it late.

    Raises:
      OSError: the file is not visible after `wait_seconds`.
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
    """Returns whether an array is divided among processes, so that no process holds all of it.

    Reading such an array is a collective operation: all processes must take part.
    """
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def to_host(x: Any, start: int | None = None, stop: int | None = None) -> np.ndarray:
    """Returns an array, or its rows from `start` to `stop`, as numpy on every process.

    If the array `spans_processes`, all processes must make this call, in the same order. Only the requested
    rows are gathered.
    """
    if spans_processes(x):
        return np.asarray(gather_rows(x, start, stop))
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # replicated: any copy will do
        x = x.addressable_data(0)
    return np.asarray(x if start is None and stop is None else x[start:stop])


def gather_rows(x: jax.Array, start: int | None = None, stop: int | None = None) -> jax.Array:
    """Returns rows of an array that `spans_processes`, replicated on one local device.

    All processes must make this call, in the same order. A process that only takes part in the collective
    ignores the result and copies nothing to its host.
    """
    size = None
    if start is not None or stop is not None:
        start, stop, _ = slice(start, stop).indices(x.shape[0])
        size = stop - start
    assert isinstance(x.sharding, NamedSharding)
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
    return _replicate(x, start or 0, size=size, sharding=replicated).addressable_data(0)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _replicate(x: jax.Array, start: int, *, size: int | None, sharding: NamedSharding) -> jax.Array:
    rows = x if size is None else jax.lax.dynamic_slice_in_dim(x, start, size)
    return jax.lax.with_sharding_constraint(rows, sharding)
