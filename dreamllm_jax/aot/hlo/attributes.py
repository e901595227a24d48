"""Typed readings of an instruction's attributes: loops, convolutions, kernels, operation names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Literal

from dreamllm_jax.aot.hlo.text import Computation, Instruction, Program

# Opcodes whose result holds the numbers of their operand, moved or in another layout.
MOVED = frozenset("copy bitcast copy-start copy-done opt-barrier optimization-barrier reshape".split())
_WINDOW = r"window=\{([^}]*)\}"
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_TRIP_COUNT = r'"known_trip_count":\{"n":"(\d+)"'
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


def operation_name(instruction: Instruction) -> str:
    """Returns the name that JAX gave to the operation, such as `jit(step)/jvp(llama)/dot_general`; "" without
    one.
    """
    return instruction.attribute(r'op_name="([^"]*)"') or ""


def is_pass(instruction: Instruction, direction: Literal["forward", "backward"]) -> bool:
    """Returns whether a differentiated operation belongs to this pass.

    JAX names the operations of a backward pass `transpose(jvp(...))` and those of the forward pass
    `jvp(...)`.
    """
    name = operation_name(instruction)
    return "jvp(" in name and ("transpose(" in name) == (direction == "backward")


def tuple_index(instruction: Instruction) -> int:
    """Returns which element a `get-tuple-element` takes."""
    return int(instruction.attribute(r"index=(\d+)") or 0)


def loop_body(loop: Instruction) -> str:
    """Returns the name of the computation that a `while` repeats."""
    name = loop.attribute(r"body=%?([\w.\-]+)")
    assert name is not None, loop.name
    return name


def trip_count(program: Program, loop: Instruction, caller: Computation) -> int | None:
    """Returns how often a `while` in `caller` runs; None if that depends on data.

    It is the compiler's annotation, or else a counter's limit minus the value the counter starts from.
    """
    if known := loop.attribute(_TRIP_COUNT):
        return int(known)
    name = loop.attribute(r"condition=%?([\w.\-]+)")
    assert name is not None, loop.name
    condition = program.computations[name]
    root = condition.root
    if root.opcode != "compare" or root.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, limit = (condition.instructions[n] for n in root.operands)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    return max(0, int(limit.argument) - _initial_value(caller, loop, tuple_index(counter)))


def _initial_value(caller: Computation, loop: Instruction, index: int) -> int:
    """Returns the constant that a loop's counter starts from, or 0 if it is not a constant."""
    start = caller.instructions[loop.operands[0]]
    if start.opcode == "tuple":
        start = caller.instructions[start.operands[index]]
    while start.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        start = caller.instructions[start.operands[0]]
    return int(start.argument) if start.opcode == "constant" else 0


def is_unchanged(program: Program, loop: Instruction, index: int) -> bool:
    """Returns whether a loop passes this element of its state through unchanged."""
    body = program.computations[loop_body(loop)]
    root = body.root
    if root.opcode != "tuple":
        return False
    part = body.instructions[root.operands[index]]
    while part.opcode in MOVED:
        part = body.instructions[part.operands[0]]
    return (
        part.opcode == "get-tuple-element"
        and tuple_index(part) == index
        and body.instructions[part.operands[0]].opcode == "parameter"
    )


def contracted_dims(dot: Instruction) -> list[int]:
    """Returns the dimensions of a `dot`'s first operand that are summed over."""
    listed = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return [int(i) for i in listed.split(",") if i]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Labels of a convolution's dimensions (`b`atch, `f`eature, `i`nput, `o`utput, digits for space), and its
    window.

    `window` has (size, stride, padding before, dilation of the input, dilation of the kernel) of each spatial
    axis.
    """

    lhs: str
    rhs: str
    out: str
    window: tuple[tuple[int, int, int, int, int], ...]


def convolution(instruction: Instruction) -> Convolution:
    """Returns the labels and the window of a convolution."""
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, instruction.attributes[:200]
    lhs, rhs, out = labels.groups()
    text = dict(part.split("=") for part in (instruction.attribute(_WINDOW) or "").split())
    axes = sum(label.isdigit() for label in out)

    def numbers(name: str, unset: str) -> list[int]:
        listed = text[name].split("x") if name in text else [unset] * axes
        return [int(item.split("_")[0]) for item in listed]

    columns = [("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")]
    return Convolution(lhs, rhs, out, tuple(zip(*(numbers(*column) for column in columns), strict=True)))


def cost_estimate(kernel: Instruction) -> Mapping[str, float]:
    """Returns the `flops` and `bytes_accessed` that a Pallas kernel states of itself; zeros if it states
    none.
    """
    stated = {"flops": 0.0, "bytes_accessed": 0.0}
    if found := kernel.attribute(r'"cost_estimate":(\{[^}]*\})'):
        stated |= {k: float(v) for k, v in json.loads(found).items() if k in stated}
    return stated


def splash_kernel(kernel: Instruction) -> str | None:
    """Returns which of splash attention's kernels this is ("fwd", "dq" or "dkv"); None for any other."""
    found = _SPLASH.match(kernel.name)
    return found.group(1) if found else None


def is_buffer_allocation(call: Instruction) -> bool:
    """Returns whether a custom call only reserves memory."""
    return 'custom_call_target="AllocateBuffer"' in call.attributes
