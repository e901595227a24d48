"""Published figures of accelerators, in one table: to add a chip, add its line here.

Training needs a device's peak (for MFU), `aot` needs all figures of a chip and of its network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as JAX counts them; `kind` is what JAX calls it (`device.device_kind`).

    `peak` is dense bfloat16 FLOP/s. `hbm` is the bytes of memory that programs may use, `hbm_bandwidth` its
    bytes per second.
    """

    kind: str
    peak: float
    hbm: float
    hbm_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Chip(Device):
    """A device whose network is known too, so that `aot` can bound a program's communication.

    `link` is the bytes per second of one ICI link in one direction; a chip has two links in each of the
    network's `dimensions`. Along a dimension whose length is a multiple of `wraps_at` the links close into
    rings. `dcn` is the chip's share of its host's network. GPUs have a switch in place of links: `link` is
    half of a GPU's bandwidth in one direction, and the single dimension always closes. `compiler_config` is
    libtpu's `chip_config_name`, for a TPU that JAX would see as two devices unless its cores are joined.
    """

    link: float
    dimensions: int
    wraps_at: int
    dcn: float
    compiler_config: str | None = None


# TPUs. Peaks and bandwidths: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. They give ICI as the
# sum of a chip's links, in one direction (Gbps) or both (GBps, "bidirectional"), and DCN by chip (v5p: 50
# Gbps) or by pod of 256 (v5e: 6.4 Tbps, v6e: 25.6 Tbps). That of v4 is not published and is taken to be
# v5e's. HBM: what libtpu's compiler (0.0.42) says is available when a program asks for more; the published
# sizes are 32, 16, 95 and 32 GiB. Where links close: jax-ml.github.io/scaling-book/tpus, on networking.
# GPUs. NVIDIA's data sheets of H100 and H200 SXM, without sparsity: NVLink has 900 GB/s in both directions
# together. DGX H100's user guide: 400 Gbps of network a GPU. HBM: what CUDA reports as the total.
CHIPS: Mapping[str, Chip] = {
    # name: kind, peak, hbm, hbm_bandwidth, link, dimensions, wraps_at, dcn
    # 2,400 Gbps over 6 links
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1.228e12, 50e9, 3, 4, 3.125e9, "megacore"),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 50e9, 2, 16, 3.125e9),  # 1,600 Gbps over 4 links
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 4, 6.25e9),  # 4,800 Gbps over 6 links
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 100e9, 2, 16, 12.5e9),  # 3,200 Gbps over 4 links
    "h100": Chip("NVIDIA H100 80GB HBM3", 989.4e12, 79.1 * GIB, 3.35e12, 225e9, 1, 1, 50e9),
    "h200": Chip("NVIDIA H200", 989.4e12, 139.8 * GIB, 4.8e12, 225e9, 1, 1, 50e9),
}
# Devices that can train, but whose programs `aot` does not bound. A v2 or v3 device is one of a chip's two
# cores and has half of its figures: docs.cloud.google.com/tpu/docs/v2 and /v3. A100: NVIDIA's data sheet
# (SXM).
OTHERS = (
    Device("TPU v2", 45e12 / 2, 16 * GIB / 2, 700e9 / 2),
    Device("TPU v3", 123e12 / 2, 32 * GIB / 2, 900e9 / 2),
    Device("NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2.039e12),
)


def find_device(kind: str) -> Device | None:
    """Returns the figures of the device that JAX calls `kind`, or None if they are not in the tables."""
    return next((device for device in (*CHIPS.values(), *OTHERS) if device.kind == kind), None)


def chip_of(kind: str) -> Chip:
    """Returns the chip that JAX calls `kind`.

    Raises:
      ValueError: the table has no figures of it.
    """
    device = find_device(kind)
    if not isinstance(device, Chip):
        raise ValueError(
            f"there are no figures of {kind!r}; the table config/chips.py has "
            f"{', '.join(chip.kind for chip in CHIPS.values())}: add a line."
        )
    return device
