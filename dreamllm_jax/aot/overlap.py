"""How much communication between devices overlaps with computation."""

from __future__ import annotations

import dataclasses
import math

from dreamllm_jax.aot.arithmetic import flops
from dreamllm_jax.aot.census import KINDS
from dreamllm_jax.aot.hlo import Computation, Instruction, Program
from dreamllm_jax.aot.runs import runs


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Bytes of the results of all collectives, and of those during which a product runs."""

    all: float
    hidden: float


def overlap(program: Program) -> Overlap:
    """Returns which collectives a schedule hides behind products, with loops multiplied out.

    A collective is hidden if a matrix product, a convolution or attention stands between its start and its
    end. How long either takes does not matter.
    """
    every = hidden = 0.0
    order: dict[str, list[Instruction]] = {}
    for run in runs(program):
        kind = run.instruction.opcode.removesuffix("-start")
        if not run.scheduled or kind not in KINDS:
            continue
        size = run.times * math.fsum(shape.bytes for shape in run.instruction.outputs)
        every += size
        steps = order.setdefault(run.within.name, list(run.within.instructions.values()))
        if _computes_during(program, run.within, steps, run.instruction):
            hidden += size
    return Overlap(every, hidden)


def _computes_during(
    program: Program, within: Computation, steps: list[Instruction], start: Instruction
) -> bool:
    """Returns whether a product runs before `start` is done; a collective without an end hides nothing."""
    if not start.opcode.endswith("-start"):
        return False
    for step in steps[steps.index(start) + 1 :]:
        if step.opcode.endswith("-done") and step.operands[0] == start.name:
            return False
        if _computes(program, within, step):
            return True
    return False


def _computes(program: Program, within: Computation, instruction: Instruction) -> bool:
    if instruction.opcode in ("dot", "convolution", "custom-call"):
        return flops(instruction, within) > 0
    if instruction.opcode not in ("fusion", "fusion-start", "async-start"):
        return False
    called = program.computations[instruction.called[0]]
    return any(_computes(program, called, part) for part in called.instructions.values())
