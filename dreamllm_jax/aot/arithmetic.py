"""FLOPs of one instruction of a compiled program: matrix products, convolutions, Pallas kernels."""

from __future__ import annotations

import functools
import math

import numpy as np

from dreamllm_jax.aot.hlo import (
    Instruction,
    Shape,
    contracted_dims,
    convolution,
    cost_estimate,
    splash_kernel,
)

# Matrix products of each kernel: scores and weighted values; the backward kernels compute the scores again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def flops(instruction: Instruction, operands: list[Shape]) -> float:
    """Returns the FLOPs of one instruction, a multiply-add as 2; 0 for any but those named above."""
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands)
    if instruction.opcode == "dot":
        contracted = math.prod(operands[0].dims[i] for i in contracted_dims(instruction))
        return 2.0 * instruction.results[0].elements * contracted
    if instruction.opcode == "custom-call":
        return cost_estimate(instruction)["flops"] or _splash(instruction, operands)
    return 0.0


def _splash(instruction: Instruction, operands: list[Shape]) -> float:
    """Returns the FLOPs of JAX's splash attention, counted as if no key were masked; 0 for other kernels.

    Its first two floating-point operands are the queries [..., N, L, H] and the keys [..., K, S, H].
    """
    kind = splash_kernel(instruction)
    if kind is None:
        return 0.0
    queries, keys = [s for s in operands if len(s.dims) >= 3 and "f" in s.dtype][:2]
    return 2.0 * _SPLASH_PRODUCTS[kind] * queries.elements * keys.dims[-2]


def _convolution(instruction: Instruction, operands: list[Shape]) -> float:
    """Returns the FLOPs of a convolution: products with an element of the input, not with padding or
    dilation.

    TPUs write matrix products as convolutions too; their batch dimensions are then dilated or padded spatial
    ones.
    """
    found = convolution(instruction)
    output = instruction.results[0].dims
    total = output[found.out.index("b")] * output[found.out.index("f")]
    total *= operands[1].dims[found.rhs.index("i")]
    for axis, settings in enumerate(found.window):
        size_in = operands[0].dims[found.lhs.index(str(axis))]
        total *= _products(size_in, output[found.out.index(str(axis))], *settings)
    return 2.0 * total


@functools.lru_cache(maxsize=4096)
def _products(
    size_in: int, size_out: int, kernel: int, stride: int, before: int, dilation: int, kernel_dilation: int
) -> int:
    """Counts, along one axis, how often an element of the kernel meets an element of the input."""
    positions = np.arange(size_out)[:, None] * stride + np.arange(kernel) * kernel_dilation - before
    inside = (positions >= 0) & (positions <= (size_in - 1) * dilation) & (positions % dilation == 0)
    return int(inside.sum())
