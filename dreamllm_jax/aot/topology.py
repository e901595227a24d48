"""Describes topologies such as `v5p:4x4x4` or `h100:8`: devices to compile for, which are not there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from dreamllm_jax.aot.compilers import check_gpu_compiler, check_tpu_compiler
from dreamllm_jax.config.chips import CHIPS, Chip

# Settings that libtpu would otherwise request from the chips and the cloud. Any type that it knows will do,
# since the topology is named in the call.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of a topology.

    These are a TPU slice, `v5p:4x4x4`; several slices, `v5p:4x4x4*2`; the GPUs of a host, `h100:8`; or of
    several hosts, `h100:8*4`. Sets environment variables that libtpu reads when it is loaded, unless they are
    set.

    Raises:
      ValueError: the topology is unknown, or the compiler for it is missing or does not fit JAX.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", topology)
    name, shape, number = found.groups() if found else ("", "", None)
    if name not in CHIPS or number == "0":
        raise ValueError(
            f"--topology={topology} is unknown; give a TPU and the shape of its slice, such as v5p:4x4x4 or "
            "v5p:4x4x4*2 for two slices, or a GPU and the number in a host, such as h100:8 or h100:8*2 for "
            f"two hosts; known are {', '.join(CHIPS)}."
        )
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # only the compiler is used
    if CHIPS[name].kind.startswith("TPU"):
        return _tpu_devices(topology, name, shape, number)
    return _gpu_devices(topology, name, shape, number)


def _tpu_devices(topology: str, name: str, shape: str, slices: str | None) -> list[Any]:
    check_tpu_compiler()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    config = CHIPS[name].compiler_config
    more: dict[str, Any] = {} if config is None else {"chip_config_name": config}
    if slices is not None:
        more["num_slices"] = int(slices)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **more)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"--topology={topology}: the TPU's compiler does not know this slice ({reason}); its TPUs come "
            "in shapes such as v5p:2x2x1, v5p:4x4x4, v5e:2x2 and v5e:16x16."
        ) from error
    return list(described.devices)


def _gpu_devices(topology: str, name: str, gpus: str, hosts: str | None) -> list[Any]:
    from dreamllm_jax.aot.gpu_target import MOST_GPUS, gpu_devices

    if not gpus.isdecimal() or not 1 <= int(gpus) <= MOST_GPUS:
        raise ValueError(
            f"--topology={topology}: a host has 1 to {MOST_GPUS} GPUs; give their number, such as {name}:8, "
            f"or {name}:8*2 for two hosts."
        )
    check_gpu_compiler()
    return gpu_devices(CHIPS[name], int(gpus), int(hosts or 1))


def links(mesh: Mesh, axes: Sequence[str], chip: Chip) -> int:
    """Returns the number of links of a chip that a collective along these mesh axes can use at once.

    The axes may span several dimensions of the network. A dimension that they fill and that closes to a ring
    gives two links, any other dimension one: at the end of a line everything passes through one link.
    """
    group = _group(mesh, axes)
    group = [device for device in group if _island(device) == _island(group[0])]
    if not hasattr(group[0], "coords"):
        return 2 * chip.dimensions
    extent = np.max([device.coords for device in mesh.devices.flat], axis=0) + 1
    filled = [len({device.coords[i] for device in group}) for i in range(len(extent))]
    rings = [n == length and length % chip.wraps_at == 0 for n, length in zip(filled, extent, strict=True)]
    return sum(2 if ring else 1 for n, ring in zip(filled, rings, strict=True) if n > 1) or 1


def islands_of(mesh: Mesh, axes: Sequence[str] | None = None) -> int:
    """Returns to how many islands the devices along these mesh axes (default: all) belong.

    An island is what fast links join: a TPU slice, or the GPUs of one host.
    """
    return len({_island(device) for device in _group(mesh, mesh.axis_names if axes is None else axes)})


def axes_within(mesh: Mesh, axes: Sequence[str]) -> list[str]:
    """Returns those of the mesh axes along which a device has neighbours on its own island."""
    first = _island(_group(mesh, ())[0])
    return [name for name in axes if sum(_island(device) == first for device in _group(mesh, (name,))) > 1]


def _group(mesh: Mesh, axes: Sequence[str]) -> list[Any]:
    """Returns the devices along these axes, at index 0 of all other axes."""
    index = tuple(slice(None) if name in axes else slice(1) for name in mesh.axis_names)
    return list(mesh.devices[index].flat)


def _island(device: Any) -> int:
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", 0)  # a single described slice lacks it
