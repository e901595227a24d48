"""Reads the text of a compiled program (`compiled.as_text()`): its computations, instructions and shapes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"  (ROOT )?%?([\w.\-]+) = ")
_END = re.compile(r"\}(?:, execution_thread=.*)?$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, sizes, and whether it lies in the device's main memory (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = result opcode(operands), attributes`. A tuple has several results."""

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str  # the text between the brackets
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found among the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def made(self) -> tuple[Shape, ...]:
        """Its results, without the operands that the beginning of a collective names beside them."""
        if self.opcode == "all-gather-start":
            return self.results[len(self.results) // 2 :]
        return self.results[1:2] if self.opcode == "collective-permute-start" else self.results

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names, branches last."""
        branches = _BRANCHES.search(self.attributes)
        listed = _NAME.findall(branches.group(1)) if branches else []
        return (*_CALLED.findall(self.attributes), *listed)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order of their schedule."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By instruction: those that take it as an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order of the call's operands."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.argument))


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the name of the one that begins."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program of an HLO module's text.

    Raises:
      ValueError: the text has no entry computation, or an instruction that cannot be read.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _logical_lines(text):
        if current is not None and (head := _INSTRUCTION.match(line)):
            instruction = _instruction(line, head)
            current.instructions[instruction.name] = instruction
        elif (header := _HEADER.match(line)) and line.endswith("{"):
            current = Computation(header.group(2), {})
            computations[current.name] = current
            entry = current.name if header.group(1) else entry
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give what compiled.as_text() returns.")
    return Program(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """The lines that begin something, each with those behind it that go on with it.

    Attributes of kernels have line breaks, behind which anything may stand.
    """
    parts: list[str] = []
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _HEADER.match(line) or _END.match(line):
            yield "".join(parts)
            parts = []
        parts.append(line)
    yield "".join(parts)


def _instruction(line: str, head: re.Match[str]) -> Instruction:
    begin = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    opcode = _OPCODE.match(line, begin)
    if opcode is None:
        raise ValueError(f"the compiled program has an instruction that cannot be read: {line[:200]}")
    end = _closing(line, opcode.end() - 1)
    argument = line[opcode.end() : end - 1]
    return Instruction(
        name=head.group(2),
        opcode=opcode.group(1),
        results=shapes(line[head.end() : begin]),
        operands=tuple(_NAME.findall(argument)) if opcode.group(1) != "constant" else (),
        argument=argument,
        attributes=line[end:],
        root=head.group(1) is not None,
    )


def _closing(line: str, begin: int) -> int:
    """The place behind the bracket that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, begin):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


@functools.lru_cache(maxsize=65536)
def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of `bf16[4,8]{1,0:T(8,128)}` or of a tuple of such; S(1) and above is not HBM."""
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@functools.cache
def bits(dtype: str) -> int:
    """Bits of one element: `bf16` 16, `f8e4m3fn` 8, `pred` 8."""
    return _BITS[dtype] if dtype in _BITS else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])


def trips(program: Program, loop: Instruction, within: Computation) -> int | None:
    """How often a `while` runs: what the compiler knows, or a counter's limit; None where data decide."""
    if known := _TRIPS.search(loop.attributes):
        return int(known.group(1))
    name = loop.attribute(r"condition=%?([\w.\-]+)")
    assert name is not None
    condition = program.computations[name]
    root = condition.root
    if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, limit = (condition.instructions[n] for n in root.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    begin = _start(within, loop, int(counter.attribute(r"index=(\d+)") or 0))
    return max(0, int(limit.argument) - begin)


def _start(within: Computation, loop: Instruction, index: int) -> int:
    """What a loop's counter begins with; 0, as in every scan, where it is not written as a constant."""
    start = within.instructions[loop.operands[0]]
    if start.opcode == "tuple":
        start = within.instructions[start.operands[index]]
    while start.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        start = within.instructions[start.operands[0]]
    return int(start.argument) if start.opcode == "constant" else 0
