"""The parser of HLO text: computations, instructions and shapes."""

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
# Asynchronous operations whose results are their operands, the results proper, and a counter.
_STARTS = ("fusion-start", "reduce-scatter-start", "all-to-all-start", "custom-call-start")
_LIBRARY = re.compile(r'custom_call_target="__cu(?:blas|dnn)\$')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its element type, its dimensions, and whether it is in the device's main memory (HBM)."""

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
    """One line: `name = result opcode(operands), attributes`. A tuple has several results.

    `argument` is the text between the parentheses.
    """

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression that is searched in the attributes; None without a
        match.
        """
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def outputs(self) -> tuple[Shape, ...]:
        """Its results, without what XLA lists beside them.

        That are the operands of an asynchronous operation, and the scratch memory of a call into a library.
        """
        if self.opcode == "all-gather-start":
            return self.results[len(self.results) // 2 :]
        if self.opcode == "collective-permute-start":
            return self.results[1:2]
        if self.opcode in _STARTS:
            after = self.results[len(self.operands) :]
            return tuple(s for s in after if (s.dtype, s.dims) != ("u32", ()))
        if self.opcode == "custom-call" and _LIBRARY.search(self.attributes) and len(self.results) > 1:
            last = self.results[-1]
            return self.results[:-1] if last.dtype in ("u8", "s8") and len(last.dims) == 1 else self.results
        return self.results

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it calls, branches last."""
        branches = _BRANCHES.search(self.attributes)
        listed = _NAME.findall(branches.group(1)) if branches else []
        return (*_CALLED.findall(self.attributes), *listed)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, in scheduled order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each instruction as an operand, by its name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in the order of the call's operands."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.argument))


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and the name of the entry computation."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Parses the text of an HLO module.

    Raises:
      ValueError: the text has no entry computation, or an instruction that cannot be parsed.
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
    """Yields logical lines: kernels have attributes with line breaks, which are joined to the line they
    continue.
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
        raise ValueError(f"the compiled program has an instruction that cannot be parsed: {line[:200]}")
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
    """Returns the index after the parenthesis that closes the one at `begin`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, begin):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(line)


@functools.lru_cache(maxsize=65536)
def shapes(text: str) -> tuple[Shape, ...]:
    """Parses `bf16[4,8]{1,0:T(8,128)}`, or a tuple of such; memory space S(1) and above is not HBM."""
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" not in layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    )


@functools.cache
def bits(dtype: str) -> int:
    """Returns the bits of one element: `bf16` 16, `f8e4m3fn` 8, `pred` 8."""
    return _BITS[dtype] if dtype in _BITS else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])
