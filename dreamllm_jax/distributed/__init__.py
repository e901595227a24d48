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
    barrier,
    check_same,
    check_shared,
    from_main,
    gather,
    is_main,
    is_spread,
    say,
    several,
    to_host,
    total,
    wait_for,
)
from dreamllm_jax.distributed.initialization import initialize, leave
from dreamllm_jax.distributed.preemption import Preempted, PreemptionGuard

__all__ = [
    "PreemptionGuard",
    "Preempted",
    "barrier",
    "check_same",
    "check_shared",
    "from_main",
    "gather",
    "initialize",
    "is_main",
    "is_spread",
    "leave",
    "say",
    "several",
    "to_host",
    "total",
    "wait_for",
]
