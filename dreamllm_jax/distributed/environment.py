"""Reads from the environment which processes run together: JAX's own variables, and those of launchers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import NamedTuple

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
EXPLICIT = f"set {ADDRESS} (host:port of process 0), {COUNT} and {INDEX}"

# Variables in which launchers give the number of processes they started.
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE", "MEGASCALE_NUM_SLICES")


class ProcessSpec(NamedTuple):
    """The address of process 0, the number of processes, and the index of this one."""

    address: str
    count: int
    index: int


def explicit_process(environment: Mapping[str, str]) -> ProcessSpec | None:
    """Returns what JAX's three variables say, or None if neither count nor index is set.

    With an address alone, JAX takes count and index from the cluster.

    Raises:
      ValueError: a variable is missing, is not a number, or contradicts another one, SLURM or MPI.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if _value(environment, name)]
    single = _value(environment, COUNT) == "1"
    if COUNT not in given and INDEX not in given:
        if given and launcher_hint(environment) is None and not _in_cluster(environment):
            raise ValueError(f"{ADDRESS} is set, but {COUNT} and {INDEX} are not; set all three, or none.")
        return None
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing and not single:
        raise ValueError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; set all three, or none."
        )
    count, index = (_integer(environment, name) for name in (COUNT, INDEX))
    count, index = count or 0, index or 0
    if not 0 <= index < count:
        raise ValueError(
            f"{INDEX}={index} does not fit {COUNT}={count}; processes are numbered from 0 to {count - 1}."
        )
    if single:
        return ProcessSpec("", 1, 0)
    address = environment[ADDRESS]
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{ADDRESS}={address} is not host:port; give, for example, 10.0.0.1:1234.")
    _check_launcher(environment, count, index)
    return ProcessSpec(address, count, index)


def launcher_hint(environment: Mapping[str, str]) -> str | None:
    """Returns the variable and value that show that a launcher started several processes, or None."""
    for name in _COUNTS:
        value = _value(environment, name)
        if value.isdigit() and int(value) > 1:
            return f"{name}={value}"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in (value := _value(environment, name)):
            return f"{name}={value}"
    if value := _value(environment, "JOB_COMPLETION_INDEX"):
        return f"JOB_COMPLETION_INDEX={value}"
    return None


def _value(environment: Mapping[str, str], name: str) -> str:
    """Returns the variable's value, or "" if it is not set."""
    return environment[name] if name in environment else ""


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = _value(environment, name)
    if not value:
        return None
    if not value.isdigit():
        raise ValueError(f"{name}={value} is not an integer; give 0, 1, 2 and so on.")
    return int(value)


def _check_launcher(environment: Mapping[str, str], count: int, index: int) -> None:
    """Checks that SLURM or MPI gives the same count and index as JAX's variables."""
    for size, rank in (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        theirs = [_integer(environment, name) for name in (size, rank)]
        if None in theirs or theirs[0] == 1 or (rank == "SLURM_PROCID" and not _in_slurm_step(environment)):
            continue
        if theirs != [count, index]:
            raise ValueError(
                f"{COUNT}={count} and {INDEX}={index} contradict {size}={theirs[0]} and {rank}={theirs[1]}; "
                "unset the former to follow the launcher."
            )


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_NODELIST" in environment


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX may detect a cluster that gives what the three variables leave out."""
    names = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_ID", "KUBERNETES_SERVICE_HOST")
    return any(name in environment for name in names)


def mpi_detection_method(environment: Mapping[str, str]) -> str | None:
    """Returns "mpi4py" for MPIs that JAX detects only on request: all but Open MPI up to version 4."""
    started = any(_value(environment, n) not in ("", "1") for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    known = "OMPI_MCA_orte_hnp_uri" in environment or _in_slurm_step(environment)
    return "mpi4py" if started and not known and importlib.util.find_spec("mpi4py") else None


def gpus_of_single_task(environment: Mapping[str, str]) -> list[int] | None:
    """Returns all GPUs of a node on which SLURM runs one task, or None. JAX would use only the first GPU."""
    gpus = _value(environment, "SLURM_GPUS_ON_NODE")
    single = re.fullmatch(r"1(\(x\d+\))?", _value(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if not _in_slurm_step(environment) or not single or not gpus.isdigit():
        return None
    return None if _value(environment, "JAX_LOCAL_DEVICE_IDS") else list(range(int(gpus)))


def no_cluster_found(error: Exception, environment: Mapping[str, str]) -> bool:
    """Returns whether JAX's error means that no cluster or group was found, or the call was too late."""
    text = str(error)
    return (
        "coordinator_address should be defined" in text
        or "must be called before" in text
        or (isinstance(error, RuntimeError) and "KUBERNETES_SERVICE_HOST" in environment)
    )
