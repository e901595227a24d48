"""`initialize` passes what the environment says to JAX, or names what is wrong with it."""

import os

import jax
import pytest

from dreamllm_jax import distributed
from dreamllm_jax.distributed import environment

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SET = {ADDRESS: "10.0.0.1:1234", COUNT: "4", INDEX: "3"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}


@pytest.fixture
def asked(monkeypatch):
    """Calls `initialize` with only these variables set; returns its calls of jax.distributed.initialize."""
    launcher = (
        "JAX_C",
        "JAX_N",
        "JAX_P",
        "JAX_L",
        "SLURM",
        "OMPI",
        "PMI",
        "TPU",
        "MEGASCALE",
        "KUBERN",
        "JOB_",
    )
    for name in list(os.environ):
        if name.startswith(launcher):
            monkeypatch.delenv(name)

    def initialize(variables: dict[str, str], error: Exception | None = None) -> list[tuple]:
        calls = []

        def stand_in(*args, **options):
            calls.append((args, options))
            if error is not None:
                raise error

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", stand_in)
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
        distributed.initialize(timeout_seconds=9)
        return calls

    return initialize


NO_CLUSTER = ValueError("coordinator_address should be defined.")


def test_explicitly(asked):
    ((args, options),) = asked(SET)
    assert args == ("10.0.0.1:1234", 4, 3)
    assert options == {"cluster_detection_method": "deactivate", "initialization_timeout": 9}


def test_alone(asked):
    assert asked({COUNT: "1"}) == [] and asked({COUNT: "1", INDEX: "0"}) == []


def test_nothing_is_set(asked):
    """On a laptop or a TPU VM JAX detects the cluster, and finds none on the laptop."""
    ((args, options),) = asked({}, NO_CLUSTER)
    assert args == () and options["cluster_detection_method"] is None and options["local_device_ids"] is None


def test_slurm(asked):
    """JAX reads SLURM's variables. A single task on a node gets all of its GPUs, not only the first."""
    ((_, options),) = asked(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"})
    assert options["local_device_ids"] == list(range(8)) and options["cluster_detection_method"] is None
    ((_, options),) = asked(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"})
    assert options["local_device_ids"] is None


def test_mpi(asked, monkeypatch):
    """JAX detects Open MPI 5 and other MPIs only through mpi4py."""
    started = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name)
    ((_, options),) = asked(started)
    assert options["cluster_detection_method"] == "mpi4py"
    ((_, options),) = asked(started | {"OMPI_MCA_orte_hnp_uri": "1;tcp://10.0.0.1:1"})
    assert options["cluster_detection_method"] is None


WRONG = {
    "no index": ({ADDRESS: "a:1", COUNT: "2"}, f"{INDEX} is not; set all three, or none."),
    "an address alone": ({ADDRESS: "a:1"}, f"{COUNT} and {INDEX} are not; set all three, or none."),
    "no number": (SET | {COUNT: "two"}, f"{COUNT}=two is not an integer"),
    "too large an index": (SET | {INDEX: "4"}, f"{INDEX}=4 does not fit {COUNT}=4"),
    "no port": (SET | {ADDRESS: "10.0.0.1"}, "is not host:port"),
    "SLURM counts otherwise": (SET | SLURM, "contradict SLURM_NTASKS=2 and SLURM_PROCID=1"),
}


@pytest.mark.parametrize(("variables", "sentence"), WRONG.values(), ids=WRONG)
def test_what_contradicts_itself_is_said(asked, variables, sentence):
    with pytest.raises(ValueError) as error:
        asked(variables)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_the_others_are_not_found(asked):
    """If a launcher started several processes, this is never silently a single one."""
    with pytest.raises(ValueError, match="PMI_SIZE=4 says that there are several processes, but not how to"):
        asked({"PMI_SIZE": "4"}, NO_CLUSTER)
    late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out\n  details")
    with pytest.raises(
        TimeoutError, match="DEADLINE_EXCEEDED: Barrier timed out: all 4 processes at 10.0.0.1:1234"
    ):
        asked(SET, late)


def test_a_host_that_is_late_is_no_wrong_recipe(asked):
    """Training then ends with exit code 1, after which clusters restart it. With 2 they do not."""
    unknown = RuntimeError("Failed to recognize coordinator address slice-0-0.dream")
    sentence = r"address slice-0-0.dream: the host of process 0 was not found within 9 s"
    with pytest.raises(TimeoutError, match=sentence):
        asked({"TPU_WORKER_HOSTNAMES": "slice-0-0.dream,slice-0-1.dream"}, unknown)


def test_too_late(asked):
    """This is an error of the program, not of its user."""
    late = RuntimeError("jax.distributed.initialize() must be called before any JAX calls.")
    with pytest.raises(RuntimeError, match="must be called before"):
        asked({"PMI_SIZE": "4"}, late)
