"""The products of a compiled program, one by one: their dtypes, their FLOPs, and where they come from."""

from __future__ import annotations

import dataclasses

from dreamllm_jax.aot.arithmetic import flops
from dreamllm_jax.aot.hlo import (
    Computation,
    FusedAttention,
    Instruction,
    Program,
    Shape,
    convolution_roles,
    fused_attention,
    is_library_call,
    library_contracted_dims,
    operation_name,
)
from dreamllm_jax.aot.runs import runs


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution that runs `times` times; `flops` are those of all times.

    `source` is the name that JAX gave to the operation. `operands` are as they are multiplied: an operand
    that a fusion converts first has the dtype after the conversion. `library` tells calls of cuBLAS and cuDNN
    from XLA's own kernels.
    """

    source: str
    operands: tuple[Shape, Shape]
    flops: float
    times: int
    library: bool


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call of cuDNN's attention that runs `times` times."""

    source: str
    kernel: FusedAttention
    times: int


def products(program: Program) -> list[Product]:
    """Returns all matrix products and convolutions, the largest first, without attention kernels."""
    found = []
    for run in runs(program):
        operands = _factors(run.instruction, run.within)
        if operands is not None:
            work = run.times * flops(run.instruction, run.within)
            source, library = operation_name(run.instruction), is_library_call(run.instruction)
            found.append(Product(source, operands, work, run.times, library))
    return sorted(found, key=lambda product: -product.flops)


def float32_products(program: Program) -> list[Product]:
    """Returns the products that have a float32 operand, the largest first."""
    return [p for p in products(program) if any(shape.dtype == "f32" for shape in p.operands)]


def attention_calls(program: Program) -> list[AttentionCall]:
    """Returns all calls of cuDNN's attention, in order. `kernel.bias` is a dense bias, or None."""
    found = []
    for run in runs(program):
        if kernel := fused_attention(run.instruction, run.within):
            found.append(AttentionCall(operation_name(run.instruction), kernel, run.times))
    return found


def _factors(instruction: Instruction, within: Computation) -> tuple[Shape, Shape] | None:
    if instruction.opcode != "dot" and library_contracted_dims(instruction) is None:
        roles = convolution_roles(instruction, within)
        if roles is None:
            return None
    first, second = (within.instructions[name].outputs[0] for name in instruction.operands[:2])
    return first, second
