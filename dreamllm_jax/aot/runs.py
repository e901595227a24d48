"""The instructions of a compiled program, each with how often it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dreamllm_jax.aot.hlo import Computation, Instruction, Program, loop_body, trip_count


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, the computation that it stands in, and how often it runs.

    `scheduled` instructions are pieces of work of their own; the others are parts of a fusion.
    """

    instruction: Instruction
    within: Computation
    times: int
    scheduled: bool


def runs(program: Program) -> Iterator[Run]:
    """Yields all instructions from the entry on, also those inside of fusions.

    A loop whose trip count depends on data counts once, as in a census; of a branch, every side counts.
    """
    yield from _runs(program, program.entry, 1, scheduled=True)


def _runs(program: Program, name: str, times: int, scheduled: bool) -> Iterator[Run]:
    within = program.computations[name]
    for instruction in within.instructions.values():
        yield Run(instruction, within, times, scheduled)
        opcode = instruction.opcode
        if opcode == "while":
            turns = trip_count(program, instruction, within)
            all_times = times if turns is None else times * turns
            yield from _runs(program, loop_body(instruction), all_times, scheduled)
        elif opcode in ("conditional", "call"):
            for called in instruction.called:
                yield from _runs(program, called, times, scheduled)
        elif opcode in ("fusion", "fusion-start", "async-start"):
            yield from _runs(program, instruction.called[0], times, scheduled=False)
