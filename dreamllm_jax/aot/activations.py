"""Of a compiled train step: what the backward pass takes from the forward pass, which waits in memory."""

from __future__ import annotations

import math

from dreamllm_jax.aot.hlo import Computation, Instruction, Program, Shape

# The same numbers at another place, or of another kind.
_MOVED = frozenset("copy bitcast copy-start copy-done opt-barrier optimization-barrier reshape".split())
_FORMS = _MOVED | frozenset("convert transpose slice fusion async-start async-done".split())
_FORMS |= {"all-gather", "all-gather-start", "all-gather-done"}


def activations(program: Program) -> float:
    """Bytes in a chip's memory that forward operations make and backward operations read.

    JAX names the operations of a backward pass `transpose(jvp(...))`, those of the forward pass `jvp(...)`.
    Counted is where most cross from the one to the other: a step's micro-batch. Inputs in another form
    (weights gathered or converted) are none, and what is computed again in the backward pass is none. All of
    it is held together where no backward operation runs before the forward pass has ended. States that are
    offloaded outside of a scan count as if they stayed.
    """
    scheduled = _scheduled(program)
    return max(_Crossing(program, program.computations[name]).bytes() for name in scheduled)


def _scheduled(program: Program) -> list[str]:
    """The entry and the bodies of loops."""
    found = [program.entry]
    for name in found:
        for instruction in program.computations[name].instructions.values():
            if instruction.opcode == "while" and (body := _body(instruction)) not in found:
                found.append(body)
    return found


def _body(loop: Instruction) -> str:
    name = loop.attribute(r"body=%?([\w.\-]+)")
    assert name is not None
    return name


def _part(instruction: Instruction) -> int:
    """Which result of its operand a get-tuple-element takes."""
    return int(instruction.attribute(r"index=(\d+)") or 0)


def _is(instruction: Instruction, direction: str) -> bool:
    name = instruction.attribute(r'op_name="([^"]*)"')
    if name is None or "jvp(" not in name:
        return False
    return ("transpose(" in name) == (direction == "backward")


class _Crossing:
    """What crosses within one computation."""

    def __init__(self, program: Program, within: Computation):
        self._program, self._within = program, within

    def bytes(self) -> float:
        """Of all values together, each once."""
        found: dict[tuple[str, int], Shape] = {}
        for instruction in self._within.instructions.values():
            if _is(instruction, "backward") and instruction.opcode not in ("get-tuple-element", *_MOVED):
                for name in instruction.operands:
                    self._collect(name, found)
        return math.fsum(shape.bytes for shape in found.values() if shape.in_hbm)

    def _collect(self, name: str, found: dict[tuple[str, int], Shape]) -> None:
        """Adds what an operand holds of the forward pass; a tuple's parts one by one."""
        operand = self._within.instructions[name]
        if operand.opcode == "tuple":
            for part in operand.operands:
                self._collect(part, found)
            return
        maker, index = self._maker(name)
        if _is(maker, "forward") and not self._input(maker.name) and index < len(maker.made):
            found[maker.name, index] = maker.made[index]

    def _maker(self, name: str) -> tuple[Instruction, int]:
        """The instruction that computed a value, and which of its results it is."""
        instruction = self._within.instructions[name]
        if instruction.opcode in _MOVED:
            return self._maker(instruction.operands[0])
        if instruction.opcode != "get-tuple-element":
            return instruction, 0
        source, index = self._within.instructions[instruction.operands[0]], _part(instruction)
        while source.opcode in _MOVED:
            source = self._within.instructions[source.operands[0]]
        if source.opcode == "tuple":
            return self._maker(source.operands[index])
        if source.opcode == "while" and self._unchanged(source, index):
            start = self._within.instructions[source.operands[0]]
            return self._maker(start.operands[index]) if start.opcode == "tuple" else (start, index)
        return source, index

    def _unchanged(self, loop: Instruction, index: int) -> bool:
        """Whether a loop hands on this part of its state as it came."""
        body = self._program.computations[_body(loop)]
        root = body.root
        if root.opcode != "tuple":
            return False
        part = body.instructions[root.operands[index]]
        while part.opcode in _MOVED:
            part = body.instructions[part.operands[0]]
        return (
            part.opcode == "get-tuple-element"
            and _part(part) == index
            and body.instructions[part.operands[0]].opcode == "parameter"
        )

    def _input(self, name: str) -> bool:
        """Whether a value is an input of the computation in another form."""
        maker, index = self._maker(name)
        if maker.opcode == "parameter":
            return True
        if maker.opcode not in _FORMS:
            return False
        sources = [n for n in maker.operands if self._within.instructions[n].opcode != "constant"]
        return len(sources) <= 1 and all(self._input(n) for n in sources)
