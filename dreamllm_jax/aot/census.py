"""What a compiled program does on one device: FLOPs, HBM bytes and collectives, with loops multiplied out."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from dreamllm_jax.aot.arithmetic import flops
from dreamllm_jax.aot.hlo import (
    Computation,
    Instruction,
    Program,
    Shape,
    loop_body,
    operation_name,
    replica_groups,
    trip_count,
)
from dreamllm_jax.aot.traffic import hbm_bytes
from dreamllm_jax.config.model import TOWERS

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# On TPUs XLA writes a reduce-scatter as a fusion that calls a computation of this name.
_SCATTER = "all-reduce-scatter"
# Parts of the model, as they appear in the names that JAX gives to operations.
_TOWER = re.compile(rf"\b({'|'.join(TOWERS)})\b")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, which runs `times` times.

    `operand` and `result` are bytes on one device, each time. `group` devices take part together; they differ
    along the mesh axes `axes`.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    operand: float
    result: float
    shapes: tuple[Shape, ...]
    source: str
    times: float = 1.0

    @property
    def received(self) -> float:
        """Bytes that a device receives, over all times.

        Counted for a ring, which moves the least: each of n devices holds one n-th and passes on n - 1 of
        them; an all-reduce does so twice.
        """
        share = (self.group - 1) / self.group
        each = {
            "all-gather": share * self.result,
            "reduce-scatter": share * self.operand,
            "all-reduce": 2 * share * self.operand,
            "all-to-all": share * self.operand,
            "collective-permute": self.operand,
        }
        return self.times * each[self.kind]


@dataclasses.dataclass
class Census:
    """Sums over a program.

    `flops` is by part of the model, with "other" for operations that name none. `data_dependent_loops` are
    loops whose trip count is not known; their bodies are counted once.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    hbm: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    data_dependent_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Census, times: float = 1.0) -> None:
        """Adds another census, `times` times."""
        for part, n in other.flops.items():
            self.flops[part] += times * n
        self.hbm += times * other.hbm
        self.collectives += [dataclasses.replace(c, times=c.times * times) for c in other.collectives]
        self.data_dependent_loops += other.data_dependent_loops

    @property
    def total_flops(self) -> float:
        return math.fsum(self.flops.values())


def take_census(program: Program, mesh: Mapping[str, int]) -> Census:
    """Returns the census of a program that is partitioned over a mesh (axis -> size)."""
    return _Counter(program, dict(mesh)).of(program.entry, scheduled=True)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ, in the mesh's order.

    `mesh` is axis -> size; device indices count through it with the last axis fastest.
    """
    coordinates = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(name for name, c in zip(mesh, coordinates, strict=True) if (c != c[:, :1]).any())


class _Counter:
    def __init__(self, program: Program, mesh: dict[str, int]):
        self._program, self._mesh, self._known = program, mesh, {}

    def of(self, name: str, scheduled: bool) -> Census:
        """Returns the census of a computation. Only `scheduled` instructions move bytes, not those of a
        fusion.
        """
        if (name, scheduled) not in self._known:
            within, found = self._program.computations[name], Census()
            for instruction in within.instructions.values():
                self._one(found, within, instruction, scheduled)
            self._known[name, scheduled] = found
        return self._known[name, scheduled]

    def _one(self, found: Census, within: Computation, instruction: Instruction, scheduled: bool) -> None:
        if scheduled:
            found.hbm += hbm_bytes(self._program, within, instruction)
        opcode = instruction.opcode
        if opcode.removesuffix("-start") in KINDS:
            self._collective(
                found, within, instruction, opcode.removesuffix("-start"), instruction.attributes
            )
        elif opcode == "while":
            self._loop(found, within, instruction, scheduled)
        elif opcode == "conditional":
            branches = [self.of(name, scheduled) for name in instruction.called]
            found.add(max(branches, key=lambda b: (b.total_flops, b.hbm)))  # the most expensive one
        elif opcode == "fusion" and instruction.called[0].startswith(_SCATTER):
            inner = self._program.computations[instruction.called[0]].instructions.values()
            attributes = next(i.attributes for i in inner if i.opcode == "all-reduce")
            self._collective(found, within, instruction, "reduce-scatter", attributes)
        elif opcode in ("fusion", "fusion-start", "async-start"):
            found.add(self.of(instruction.called[0], scheduled=False))
        elif opcode == "call":
            found.add(self.of(instruction.called[0], scheduled))
        elif opcode in ("convolution", "dot", "custom-call"):
            n = flops(instruction, within)
            if n:
                found.add(Census(flops={_tower(instruction): n}))

    def _loop(self, found: Census, within: Computation, loop: Instruction, scheduled: bool) -> None:
        times = trip_count(self._program, loop, within)
        if times is None:
            found.data_dependent_loops.append(loop.name)
        found.add(self.of(loop_body(loop), scheduled), 1.0 if times is None else float(times))

    def _collective(
        self, found: Census, within: Computation, instruction: Instruction, kind: str, attributes: str
    ) -> None:
        groups = replica_groups(attributes, math.prod(self._mesh.values()))
        axes = axes_of(groups, self._mesh)
        if not axes:
            return  # every device is its own group
        results = instruction.outputs
        operands = self._operands(within, instruction)
        found.collectives.append(
            Collective(
                kind=kind,
                axes=axes,
                group=groups.shape[1] if kind != "collective-permute" else 2,
                operand=math.fsum(s.bytes for s in operands),
                result=math.fsum(s.bytes for s in results),
                shapes=tuple(results if kind != "reduce-scatter" else operands),
                source=operation_name(instruction),
            )
        )

    def _operands(self, within: Computation, instruction: Instruction) -> list[Shape]:
        return [s for name in instruction.operands for s in within.instructions[name].results]


def _tower(instruction: Instruction) -> str:
    found = _TOWER.search(operation_name(instruction))
    return found.group(1) if found else "other"
