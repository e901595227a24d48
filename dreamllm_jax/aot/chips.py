"""Published figures of the chips that programs are made for; their bfloat16 peaks are `train.flops.PEAKS`."""

from __future__ import annotations

import dataclasses

from dreamllm_jax.train.flops import PEAKS

GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: bytes of HBM, and bytes per second of everything that moves them.

    `kind` is what JAX calls it. `hbm` is what programs may use. `link` is one ICI link in one direction; a
    chip has two links in each of the network's `dimensions`. Along a dimension whose length is a multiple of
    `wraps_at` the links close into rings. `dcn` is the chip's share of its host's network. GPUs have a
    switch in place of links: `link` is all that one sends, and there is one dimension that always closes.
    """

    kind: str
    hbm: float
    hbm_bandwidth: float
    link: float
    dimensions: int
    wraps_at: int
    dcn: float

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAKS[self.kind]


# HBM: what libtpu's compiler (0.0.42) says is available when a program asks for more; the published sizes are
# 32, 16, 95 and 32 GiB. All else of TPUs: docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, which give
# ICI as the sum of a chip's links, in one direction (Gbps) or both (GBps, "bidirectional"), and DCN by chip
# (v5p: 50 Gbps) or by pod of 256 (v5e: 6.4 Tbps, v6e: 25.6 Tbps). That of v4 is not published: it is taken to
# be v5e's. Where links close: jax-ml.github.io/scaling-book/tpus, on networking.
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1.228e12, 50e9, 3, 4, 3.125e9),  # 2,400 Gbps over 6 links
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 50e9, 2, 16, 3.125e9),  # 1,600 Gbps over 4 links
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 100e9, 3, 4, 6.25e9),  # 4,800 Gbps over 6 links
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 100e9, 2, 16, 12.5e9),  # 3,200 Gbps over 4 links
    # NVIDIA's data sheets of H100 and H200 SXM: NVLink 900 GB/s in both directions together; DGX H100's user
    # guide: 400 Gbps of network a GPU.
    "h100": Chip("NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 225e9, 1, 1, 50e9),
    "h200": Chip("NVIDIA H200", 141e9, 4.8e12, 225e9, 1, 1, 50e9),
}


def chip_of(kind: str) -> Chip:
    """The chip that JAX calls so (`device.device_kind`).

    Raises:
      ValueError: its figures are not in the table.
    """
    for chip in CHIPS.values():
        if chip.kind == kind:
            return chip
    raise ValueError(
        f"there are no figures of {kind!r}; the table aot/chips.py has "
        f"{', '.join(c.kind for c in CHIPS.values())}."
    )
