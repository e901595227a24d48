"""Bytes that one instruction of a compiled program moves between a chip and its HBM."""

from __future__ import annotations

import math

from dreamllm_jax.aot.hlo import (
    Computation,
    Instruction,
    Program,
    Shape,
    cost_estimate,
    is_buffer_allocation,
)

# Opcodes that move nothing themselves: aliases and parts of arrays, control flow, the ends of asynchronous
# pairs.
STILL = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all add-dependency "
    "partition-id replica-id opt-barrier async-start async-update async-done copy-done slice-done "
    "all-gather-done all-reduce-done collective-permute-done send send-done recv recv-done fusion-done "
    "reduce-scatter-done all-to-all-done custom-call-done".split()
)
_PARTS = ("dynamic-slice", "slice", "gather")


def hbm_bytes(program: Program, within: Computation, instruction: Instruction) -> float:
    """Returns the bytes that a scheduled instruction reads and writes, each operand and result once.

    Where a slice of an array is read or overwritten, only the slice counts. On-chip memory does not count.
    Arrays are counted without the padding of their tiles.
    """
    opcode = instruction.opcode
    if opcode in STILL:
        return 0.0
    if opcode in ("fusion", "fusion-start"):
        return _fusion(program, within, instruction)
    if opcode == "custom-call":
        if stated := cost_estimate(instruction)["bytes_accessed"]:
            return stated
        if is_buffer_allocation(instruction):
            return 0.0
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(within.instructions[instruction.operands[1]].results)
    if opcode in _PARTS:
        return 2 * _in_hbm(instruction.results)
    if opcode in ("copy-start", "slice-start"):
        return math.fsum(s.bytes for s in instruction.results[:2] if s.in_hbm)
    read = math.fsum(_in_hbm(within.instructions[name].outputs) for name in instruction.operands)
    return read + _in_hbm(instruction.outputs)


def _in_hbm(results: tuple[Shape, ...]) -> float:
    return math.fsum(s.bytes for s in results if s.in_hbm)


def read_bytes(program: Program, within: Computation, instruction: Instruction, position: int) -> float:
    """Returns the bytes that a scheduled instruction reads of its operand at this position."""
    operand = within.instructions[instruction.operands[position]]
    if not all(s.in_hbm for s in operand.outputs):
        return 0.0
    if instruction.opcode in ("fusion", "fusion-start"):
        fused = program.computations[instruction.called[0]]
        return _read(program, fused, fused.parameters[position])
    if instruction.opcode in _PARTS and position == 0:
        return _in_hbm(instruction.results)
    return _in_hbm(operand.outputs)


def _fusion(program: Program, within: Computation, instruction: Instruction) -> float:
    fused = program.computations[instruction.called[0]]
    operands = range(len(instruction.operands))
    total = math.fsum(read_bytes(program, within, instruction, position) for position in operands)
    root = _source(fused, fused.root)
    parts = (
        [_source(fused, fused.instructions[n]) for n in root.operands] if root.opcode == "tuple" else [root]
    )
    for part, result in zip(parts, instruction.outputs, strict=False):
        if result.in_hbm:
            total += _written(program, fused, part, result)
    return total


def _source(fused: Computation, instruction: Instruction) -> Instruction:
    """Follows a chain of bitcasts back to its beginning."""
    while instruction.opcode == "bitcast":
        instruction = fused.instructions[instruction.operands[0]]
    return instruction


def _written(program: Program, fused: Computation, part: Instruction, result: Shape) -> float:
    if part.opcode == "dynamic-update-slice":
        return math.fsum(s.bytes for s in fused.instructions[part.operands[1]].results)
    if part.opcode == "fusion":
        inner = program.computations[part.called[0]]
        return _written(program, inner, _source(inner, inner.root), result)
    return result.bytes


def _read(program: Program, fused: Computation, value: Instruction) -> float:
    """Returns the bytes of a parameter that a fusion reads."""
    all_bytes = math.fsum(s.bytes for s in value.results)
    total = 0.0
    for user in fused.users[value.name] if value.name in fused.users else ():
        if user.opcode == "bitcast":
            total += _read(program, fused, user)
        elif user.opcode in _PARTS and user.operands[0] == value.name:
            total += math.fsum(s.bytes for s in user.results)
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]]
            total += math.fsum(
                _read(program, inner, parameter)
                for name, parameter in zip(user.operands, inner.parameters, strict=True)
                if name == value.name
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
            return all_bytes
    return min(all_bytes, total)
