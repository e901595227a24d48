"""A lower bound of a program's time: the seconds that each resource of the chips is busy at its peak."""

from __future__ import annotations

import collections
import dataclasses
import math

from jax.sharding import Mesh

from dreamllm_jax.aot.census import Census, Collective
from dreamllm_jax.aot.topology import axes_within, islands_of, links
from dreamllm_jax.config.chips import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds by resource: "compute", "hbm", "ici AXES" for each combination of mesh axes, "dcn".

    On GPUs the links of a host are called "nvlink AXES", and what joins hosts "network".
    `peak` is the FLOP/s of all chips together.
    """

    seconds: dict[str, float]
    model_flops: float
    peak: float

    @property
    def limit(self) -> str:
        """The resource that is busy longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def bound(self) -> float:
        """The least number of seconds, if all resources are busy at once."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """The seconds if nothing overlaps."""
        return math.fsum(self.seconds.values())

    def mfu(self, seconds: float) -> float:
        """Returns the model FLOPs utilization (of the bfloat16 peak) of a run that takes `seconds`."""
        return self.model_flops / (self.peak * seconds) if seconds else 0.0


def roofline(census: Census, model_flops: float, mesh: Mesh, chip: Chip) -> Roofline:
    """Returns the roofline of a program from its census; `model_flops` is over all devices."""
    seconds = collections.defaultdict(float)
    seconds |= {"compute": census.total_flops / chip.peak, "hbm": census.hbm / chip.hbm_bandwidth}
    for collective in census.collectives:
        for name, time in _seconds(collective, mesh, chip).items():
            seconds[name] += time
    return Roofline(dict(seconds), model_flops, mesh.size * chip.peak)


def _seconds(collective: Collective, mesh: Mesh, chip: Chip) -> dict[str, float]:
    """Returns seconds by network. Over several slices (or hosts of GPUs) a collective takes two steps: within
    each slice, then across.
    """
    inner, outer = ("ici", "dcn") if chip.kind.startswith("TPU") else ("nvlink", "network")
    slices = islands_of(mesh, collective.axes)
    found = {}
    if slices > 1:
        inside = max(1, collective.group // slices)
        part = 1 if collective.kind in ("all-to-all", "collective-permute") else inside
        between = dataclasses.replace(
            collective,
            group=slices,
            operand=collective.operand / part,
            result=collective.result / part,
        )
        found[outer] = between.received / chip.dcn
        collective = dataclasses.replace(collective, group=inside)
    if collective.group > 1:
        within = axes_within(mesh, collective.axes) if slices > 1 else list(collective.axes)
        found[f"{inner} {'+'.join(within)}"] = collective.received / _bandwidth(
            collective, mesh, within, chip
        )
    return found


def _bandwidth(collective: Collective, mesh: Mesh, axes: list[str], chip: Chip) -> float:
    """Returns the bytes per second that a chip receives.

    On TPUs a permutation sends to one neighbor, along one link, and in an all-to-all on a ring of n chips
    data passes n / 4 links on average. A GPU sends to any other through a switch.
    """
    total = links(mesh, axes, chip) * chip.link
    if not chip.kind.startswith("TPU"):
        return total
    if collective.kind == "collective-permute":
        return chip.link
    if collective.kind == "all-to-all":
        return total / max(1.0, collective.group / 4)
    return total
