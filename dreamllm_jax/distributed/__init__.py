"""Several processes as one program: how they find each other, agree, wait, and speak once.

One process runs on each host (or, with GPUs, on each of them), all with the same command. `initialize`
comes before anything that asks JAX for its devices. It starts, in this order,

    what JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, where they are set;
    what JAX itself finds out: Cloud TPU (also on GKE, also several slices), SLURM, Open MPI,
      Kubernetes jobs and JobSets, other MPIs by mpi4py;
    one process, where there is nothing.

Process 0 is the main one: it alone writes files and prints.
"""

from dreamllm_jax.distributed.coordination import (
    all_gather,
    barrier,
    broadcast_from_main,
    check_equal_on_processes,
    check_shared_folder,
    is_main,
    is_multi_process,
    print_on_main,
    spans_processes,
    sum_over_processes,
    to_host,
    wait_for_file,
)
from dreamllm_jax.distributed.initialization import exit_process, initialize
from dreamllm_jax.distributed.preemption import Preempted, PreemptionGuard

__all__ = [
    "PreemptionGuard",
    "Preempted",
    "barrier",
    "check_equal_on_processes",
    "check_shared_folder",
    "broadcast_from_main",
    "all_gather",
    "initialize",
    "is_main",
    "spans_processes",
    "exit_process",
    "print_on_main",
    "is_multi_process",
    "to_host",
    "sum_over_processes",
    "wait_for_file",
]
