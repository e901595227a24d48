"""How weights move in a compiled program: read where they lie, or first copied, turned around or cast."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from dreamllm_jax.aot.hlo import (
    Computation,
    Instruction,
    Program,
    is_unchanged,
    operation_name,
    tuple_index,
)
from dreamllm_jax.aot.runs import Run, runs
from dreamllm_jax.aot.traffic import STILL, hbm_bytes, read_bytes

# The arguments of train steps and of generation that are weights, as JAX names them in the compiled text.
WEIGHTS = r"state\.(trainable|frozen)\b|params\b"
# Opcodes that move numbers and compute nothing; with `convert` also those that change their dtype.
_MOVES = frozenset(
    "copy copy-start transpose reshape bitcast slice dynamic-slice dynamic-update-slice concatenate pad "
    "broadcast convert parameter constant iota tuple get-tuple-element".split()
)
# Results of at most so many elements are indices and bounds; whatever computes them does not count as work.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class WeightCopy:
    """An instruction that only moves a weight, or a part of it. `bytes` are read and written, over all times.

    `weight` is the parameter's name, `source` that of the operation.
    """

    weight: str
    source: str
    bytes: float
    times: int
    cast: bool


@dataclasses.dataclass(frozen=True)
class WeightTraffic:
    """Bytes of weights: `read` for the work itself; read and written to be `copied` or `cast`."""

    read: float
    copied: float
    cast: float


def weight_traffic(program: Program, weights: str = WEIGHTS) -> WeightTraffic:
    """Returns the traffic of the entry's parameters whose operation name begins as `weights` says.

    A weight that is copied first is read again, as a copy.
    """
    copies, of = weight_copies(program, weights), _Weights(program, weights)
    return WeightTraffic(
        math.fsum(of.read(run) for run in runs(program) if run.scheduled),
        math.fsum(copy.bytes for copy in copies if not copy.cast),
        math.fsum(copy.bytes for copy in copies if copy.cast),
    )


def weight_copies(program: Program, weights: str = WEIGHTS) -> list[WeightCopy]:
    """Returns the instructions whose only job is to copy, cut, turn around or cast weights, largest first.

    One that also computes something else (XLA may join independent work in one kernel) is not among them.
    """
    of, found = _Weights(program, weights), []
    for run in runs(program):
        if run.scheduled and (weight := of.copied(run)):
            moved = run.times * hbm_bytes(program, run.within, run.instruction)
            name, cast = operation_name(run.instruction), of.casts(run.instruction)
            found.append(WeightCopy(weight, name, moved, run.times, cast))
    return sorted(found, key=lambda copy: -copy.bytes)


class _Weights:
    """Which values of a program are weights, in whatever form."""

    def __init__(self, program: Program, weights: str):
        self._program, self._pattern = program, re.compile(weights)
        self._callers = dict(_callers(program))
        self._known: dict[tuple[str, str, int], str | None] = {}

    def read(self, run: Run) -> float:
        """Returns the bytes of weights that an instruction reads for its work, in all times."""
        instruction, within = run.instruction, run.within
        if instruction.opcode in STILL or instruction.opcode.startswith("all-gather") or self.copied(run):
            return 0.0
        return run.times * math.fsum(
            read_bytes(self._program, within, instruction, position)
            for position, name in enumerate(instruction.operands)
            if self._weight(within, name)
        )

    def copied(self, run: Run) -> str | None:
        """Returns the name of the weight that an instruction only moves; None if it does anything else."""
        return None if run.instruction.opcode in STILL else self._moved(run.within, run.instruction)

    def casts(self, instruction: Instruction) -> bool:
        """Returns whether an instruction moves values and changes their dtype."""
        return any(i.opcode == "convert" and not _is_few(i) for i in self._parts(instruction))

    def _weight(self, within: Computation, name: str, index: int = 0) -> str | None:
        """Returns the name of the weight that a value (or an element of a tuple) holds; None for others."""
        key = (within.name, name, index)
        if key not in self._known:
            self._known[key] = None  # within a loop, a value that depends on itself is not a weight
            self._known[key] = self._find(within, within.instructions[name], index)
        return self._known[key]

    def _find(self, within: Computation, value: Instruction, index: int) -> str | None:
        opcode = value.opcode
        if opcode == "parameter":
            return self._parameter(within, value, index)
        if opcode == "get-tuple-element":
            return self._weight(within, value.operands[0], tuple_index(value))
        if opcode in ("tuple", "all-gather", "all-gather-start"):
            return self._weight(within, value.operands[index])
        if opcode == "while":
            same = is_unchanged(self._program, value, index)
            return self._weight(within, value.operands[0], index) if same else None
        if opcode in ("bitcast", "opt-barrier") or opcode.endswith("-done"):
            return self._weight(within, value.operands[0], index)
        return self._moved(within, value)

    def _parameter(self, within: Computation, value: Instruction, index: int) -> str | None:
        if within.name == self._program.entry:
            name = operation_name(value)
            return name if self._pattern.match(name) else None
        if within.name not in self._callers:
            return None
        outer, call, operand = self._callers[within.name]
        if call.opcode == "while" and not is_unchanged(self._program, call, index):
            return None
        return self._weight(outer, call.operands[operand + int(value.argument)], index)

    def _moved(self, within: Computation, value: Instruction) -> str | None:
        """Returns the weight that an instruction moves; None if it computes, or moves anything else too."""
        if any(part.opcode not in _MOVES and not _is_few(part) for part in self._parts(value)):
            return None
        targets = self._targets(value)
        names = [
            self._weight(within, name)
            for position, name in enumerate(value.operands)
            if position not in targets and not _is_few(within.instructions[name])
        ]
        return names[0] if names and all(names) else None

    def _parts(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instruction, or those that a fusion consists of."""
        if instruction.opcode not in ("fusion", "fusion-start"):
            return [instruction]
        fused = self._program.computations[instruction.called[0]].instructions.values()
        return [part for one in fused for part in self._parts(one)]

    def _targets(self, instruction: Instruction) -> set[int]:
        """Returns the positions of the operands that are only written over."""
        if instruction.opcode == "dynamic-update-slice":
            return {0}
        if instruction.opcode not in ("fusion", "fusion-start"):
            return set()
        fused = self._program.computations[instruction.called[0]]
        written = {i.operands[0] for i in fused.instructions.values() if i.opcode == "dynamic-update-slice"}
        return {position for position, p in enumerate(fused.parameters) if p.name in written}


def _is_few(instruction: Instruction) -> bool:
    return all(shape.elements <= _FEW for shape in instruction.results)


def _callers(program: Program) -> Iterator[tuple[str, tuple[Computation, Instruction, int]]]:
    """Yields each computation that is called, and its caller, the call, and the first operand it is given."""
    for within in program.computations.values():
        for instruction in within.instructions.values():
            if instruction.opcode in ("while", "call"):
                for name in instruction.called:
                    yield name, (within, instruction, 0)
            elif instruction.opcode == "conditional":
                for branch, name in enumerate(instruction.called):
                    yield name, (within, instruction, 1 + branch)
