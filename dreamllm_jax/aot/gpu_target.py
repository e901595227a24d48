"""Describes hosts of NVIDIA GPUs to JAX's CUDA plugin, which compiles for them without a GPU or CUDA.

What is compiled differs from a run in two ways. Nothing is tuned on a device, so that kernels have their
default tiles and algorithms, and the workspaces of cuDNN count as empty.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as fused  # JAX has no public names for these two
from jax._src.lib import cuda_versions
from jax.experimental import topologies

from dreamllm_jax.config.chips import Chip

MOST_GPUS = 8  # of a host, all joined by NVLink: what DGX and HGX systems have
# The cuDNN that JAX is told of where none is installed; JAX asks for the version before it traces cuDNN's
# attention, and XLA writes the calls without the library.
CUDNN = (9, 28, 1)
# XLA's GpuTargetConfigProto. The figures of Hopper are those of CUDA's programming guide for compute
# capability 9.0 and of NVIDIA's data sheets. The driver and CUDA are given because older ones do not take
# loops and branches into CUDA graphs.
_SPEC = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{kind}"
"""


def gpu_devices(chip: Chip, gpus: int, hosts: int) -> list[Any]:
    """Returns the described GPUs of `hosts` hosts with `gpus` each, those of one host side by side.

    Where cuDNN or a GPU is missing, JAX is told that it is there: cuDNN's attention can then be traced, but
    not run.
    """
    _describe_cudnn()
    spec = _SPEC.format(bandwidth=int(chip.hbm_bandwidth), memory=int(chip.hbm), cudnn=CUDNN, kind=chip.kind)
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=spec, topology=f"1x{hosts}x{gpus}"
    )
    return list(described.devices)


def _describe_cudnn() -> None:
    versions: Any = cuda_versions
    try:
        versions.cudnn_get_version()
    except RuntimeError:
        major, minor, patch = CUDNN
        versions.cudnn_get_version = lambda: 10_000 * major + 100 * minor + patch
    if jax.default_backend() != "gpu":
        attention: Any = fused
        attention.check_compute_capability = _is_at_most_hopper


def _is_at_most_hopper(capability: str) -> bool:
    return float(capability) <= 9.0
