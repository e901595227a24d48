"""Activations of a compiled train step: what the forward pass computes and the backward pass reads."""

from __future__ import annotations

import math

from dreamllm_jax.aot.hlo import (
    MOVED,
    Computation,
    Instruction,
    Program,
    Shape,
    is_pass,
    is_unchanged,
    loop_body,
    tuple_index,
)

_FORMS = MOVED | frozenset(
    "convert transpose slice fusion fusion-start fusion-done async-start async-done".split()
)
_FORMS |= {"all-gather", "all-gather-start", "all-gather-done"}


def activations(program: Program) -> float:
    """Returns the bytes in a chip's HBM that forward operations write and backward operations read.

    The count is that of the computation in which most of them cross, which is a step's micro-batch. Inputs in
    another form (weights that were gathered or cast) are not activations, nor is what the backward pass
    computes again. All activations are held at once, since the backward pass starts after the forward pass.
    States that are offloaded outside of a scan count as if they stayed.
    """
    scheduled = _scheduled(program)
    return max(_Crossing(program, program.computations[name]).bytes() for name in scheduled)


def _scheduled(program: Program) -> list[str]:
    """Returns the names of the entry computation and of all loop bodies."""
    found = [program.entry]
    for name in found:
        for instruction in program.computations[name].instructions.values():
            if instruction.opcode == "while" and (body := loop_body(instruction)) not in found:
                found.append(body)
    return found


class _Crossing:
    """The values that cross from the forward to the backward pass within one computation."""

    def __init__(self, program: Program, within: Computation):
        self._program, self._within = program, within

    def bytes(self) -> float:
        """Returns the bytes of all of them, each counted once."""
        found: dict[tuple[str, int], Shape] = {}
        for instruction in self._within.instructions.values():
            if is_pass(instruction, "backward") and instruction.opcode not in ("get-tuple-element", *MOVED):
                for name in instruction.operands:
                    self._collect(name, found)
        return math.fsum(shape.bytes for shape in found.values() if shape.in_hbm)

    def _collect(self, name: str, found: dict[tuple[str, int], Shape]) -> None:
        """Adds what an operand holds of the forward pass; the elements of a tuple one by one."""
        operand = self._within.instructions[name]
        if operand.opcode == "tuple":
            for part in operand.operands:
                self._collect(part, found)
            return
        producer, index = self._producer(name)
        if is_pass(producer, "forward") and not self._input(producer.name) and index < len(producer.outputs):
            found[producer.name, index] = producer.outputs[index]

    def _producer(self, name: str) -> tuple[Instruction, int]:
        """Returns the instruction that computed a value, and the index of the value among its results."""
        instruction = self._within.instructions[name]
        if instruction.opcode in MOVED:
            return self._producer(instruction.operands[0])
        if instruction.opcode != "get-tuple-element":
            return instruction, 0
        source, index = self._within.instructions[instruction.operands[0]], tuple_index(instruction)
        while source.opcode in MOVED:
            source = self._within.instructions[source.operands[0]]
        if source.opcode == "tuple":
            return self._producer(source.operands[index])
        if source.opcode == "while" and is_unchanged(self._program, source, index):
            start = self._within.instructions[source.operands[0]]
            return self._producer(start.operands[index]) if start.opcode == "tuple" else (start, index)
        return source, index

    def _input(self, name: str) -> bool:
        """Returns whether a value is an input of the computation in another form."""
        producer, index = self._producer(name)
        if producer.opcode == "parameter":
            return True
        if producer.opcode not in _FORMS:
            return False
        sources = [n for n in producer.operands if self._within.instructions[n].opcode != "constant"]
        return len(sources) <= 1 and all(self._input(n) for n in sources)
