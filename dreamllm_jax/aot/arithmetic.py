"""FLOPs of one instruction of a compiled program: products, convolutions, library calls, Pallas kernels."""

from __future__ import annotations

import functools
import math

import numpy as np

from dreamllm_jax.aot.hlo import (
    Computation,
    Instruction,
    Shape,
    contracted_dims,
    convolution,
    convolution_roles,
    cost_estimate,
    fused_attention,
    library_contracted_dims,
    splash_kernel,
)

# Matrix products of each kernel: scores and weighted values; the backward kernels compute the scores again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_FUSED_PRODUCTS = {False: 2, True: 5}  # of cuDNN's attention, by whether it is the backward pass


def flops(instruction: Instruction, within: Computation) -> float:
    """Returns the FLOPs of one instruction, a multiply-add as 2; 0 for any but those named above.

    Attention kernels are counted as if no key were masked.
    """
    if roles := convolution_roles(instruction, within):
        return _convolution(instruction, *roles)
    contracted = library_contracted_dims(instruction)
    if instruction.opcode == "dot":
        contracted = contracted_dims(instruction)
    if contracted is not None:
        first = within.instructions[instruction.operands[0]].outputs[0]
        return 2.0 * instruction.results[0].elements * math.prod(first.dims[i] for i in contracted)
    if attention := fused_attention(instruction, within):
        return 2.0 * _FUSED_PRODUCTS[attention.backward] * math.prod(attention.scores) * attention.head_dim
    if instruction.opcode == "custom-call":
        return cost_estimate(instruction)["flops"] or _splash(instruction, within)
    return 0.0


def _splash(instruction: Instruction, within: Computation) -> float:
    """Returns the FLOPs of JAX's splash attention; 0 for other kernels.

    Its first two floating-point operands are the queries [..., N, L, H] and the keys [..., K, S, H].
    """
    kind = splash_kernel(instruction)
    if kind is None:
        return 0.0
    operands = (s for name in instruction.operands for s in within.instructions[name].outputs)
    queries, keys = [s for s in operands if len(s.dims) >= 3 and "f" in s.dtype][:2]
    return 2.0 * _SPLASH_PRODUCTS[kind] * queries.elements * keys.dims[-2]


def _convolution(instruction: Instruction, image: Shape, kernel: Shape, result: Shape) -> float:
    """Returns the FLOPs of a convolution: products with an element of the input, not with padding or
    dilation.

    TPUs write matrix products as convolutions too; their batch dimensions are then dilated or padded spatial
    ones.
    """
    found = convolution(instruction)
    output = result.dims
    total = output[found.out.index("b")] * output[found.out.index("f")]
    total *= kernel.dims[found.rhs.index("i")]
    for axis, settings in enumerate(found.window):
        size_in = image.dims[found.lhs.index(str(axis))]
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
