"""Several processes that run one program.

In: the environment that a launcher set, and values that one process has and the others need.
Out: a joined process group, agreement on those values, and host copies of arrays that span processes.
Never: a decision about the model, the data or the mesh.

One process runs on each host, or one per GPU, all with the same command. Call `initialize` before anything
asks JAX for its devices. It uses the first of these that applies:

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, where they are set;
    the cluster that JAX detects: Cloud TPU (also on GKE, also with several slices), SLURM, Open MPI,
      Kubernetes jobs and JobSets, and other MPIs through mpi4py;
    a single process otherwise.

Process 0 is the main process. It prints, and it writes every file that is not divided among processes.
"""

from dreamllm_jax.distributed.coordination import (
    all_gather,
    barrier,
    broadcast_from_main,
    check_equal_on_processes,
    check_shared_folder,
    gather_rows,
    is_main,
    is_multi_process,
    print_on_main,
    run_on_main,
    spans_processes,
    sum_over_processes,
    to_host,
    wait_for_file,
)
from dreamllm_jax.distributed.initialization import exit_process, initialize
from dreamllm_jax.distributed.preemption import Preempted, PreemptionGuard

__all__ = [
    "Preempted",
    "PreemptionGuard",
    "all_gather",
    "barrier",
    "broadcast_from_main",
    "check_equal_on_processes",
    "check_shared_folder",
    "exit_process",
    "gather_rows",
    "initialize",
    "is_main",
    "is_multi_process",
    "print_on_main",
    "run_on_main",
    "spans_processes",
    "sum_over_processes",
    "to_host",
    "wait_for_file",
]
