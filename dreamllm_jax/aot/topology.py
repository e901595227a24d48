"""Describes TPU topologies such as `v5p:4x4x4`: devices that programs compile for, but cannot run on."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

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
    """Returns the devices of a topology such as `v5p:4x4x4`, or of several slices: `v5p:4x4x4*2`.

    Sets environment variables that libtpu reads when it is loaded, unless they are set.

    Raises:
      ValueError: libtpu is not installed, or it does not know the topology.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", topology)
    name, shape, slices = found.groups() if found else ("", "", None)
    if name not in CHIPS or not CHIPS[name].kind.startswith("TPU") or slices == "0":
        raise ValueError(
            f"--topology={topology} is unknown; give a TPU and the shape of its slice, such as v5p:4x4x4, "
            "v5e:16x16, or v5p:4x4x4*2 for two slices; TPUs: "
            f"{', '.join(k for k, c in CHIPS.items() if c.kind.startswith('TPU'))}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which holds the TPU's compiler, is not installed; pip install 'jax[tpu]' (Linux on x86 "
            "only; no TPU is needed)."
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # only libtpu's compiler is used
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


def links(mesh: Mesh, axes: Sequence[str], chip: Chip) -> int:
    """Returns the number of ICI links of a chip that a collective along these mesh axes can use at once.

    The axes may span several dimensions of the network. A dimension that they fill and that closes to a ring
    gives two links, any other dimension one: at the end of a line everything passes through one link.
    """
    group = _group(mesh, axes)
    group = [device for device in group if _slice(device) == _slice(group[0])]
    if not hasattr(group[0], "coords"):
        return 2 * chip.dimensions
    extent = np.max([device.coords for device in mesh.devices.flat], axis=0) + 1
    filled = [len({device.coords[i] for device in group}) for i in range(len(extent))]
    rings = [n == length and length % chip.wraps_at == 0 for n, length in zip(filled, extent, strict=True)]
    return sum(2 if ring else 1 for n, ring in zip(filled, rings, strict=True) if n > 1) or 1


def slices_of(mesh: Mesh, axes: Sequence[str] | None = None) -> int:
    """Returns to how many slices the devices along these mesh axes (default: all) belong."""
    return len({_slice(device) for device in _group(mesh, mesh.axis_names if axes is None else axes)})


def _group(mesh: Mesh, axes: Sequence[str]) -> list[Any]:
    """Returns the devices along these axes, at index 0 of all other axes."""
    index = tuple(slice(None) if name in axes else slice(1) for name in mesh.axis_names)
    return list(mesh.devices[index].flat)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)  # a single described slice lacks it
