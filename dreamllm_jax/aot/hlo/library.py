"""Typed readings of the calls into NVIDIA's libraries that XLA writes for GPUs: cuBLAS and cuDNN.

Their targets are `__cublas$gemm`, `__cublas$lt$matmul` (and `$f8`), `__cudnn$convForward` (also
`BackwardInput`, `BackwardFilter`, `BiasActivationForward`), and cuDNN's fused attention,
`__cudnn$fmha[ScaleBias]Softmax[Dropout][Backward]`.
"""

from __future__ import annotations

import dataclasses
import re

from dreamllm_jax.aot.hlo.text import Computation, Instruction, Shape

_TARGET = r'custom_call_target="([^"]*)"'
_CONTRACTED = r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]'
_SCORES = r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]'
_MASK = r'"mask_type":\s*"(\w+)"'
_SEGMENTS = r'"max_seg_per_batch":\s*"?(\d+)'
_BIAS = {False: 3, True: 5}  # the bias's place among the operands, by whether the call is the backward pass


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """One call of cuDNN's attention. `scores` are the sizes [B, N, L, S] of the scores, which stay on chip.

    `bias` is an array that is added to the scores, or None. `mask` is cuDNN's name of the mask that the
    kernel applies itself, such as CAUSAL; `segments` the most segments of a row.
    """

    backward: bool
    scores: tuple[int, ...]
    head_dim: int
    bias: Shape | None
    mask: str
    segments: int


def call_target(call: Instruction) -> str:
    """Returns the target of a custom call; "" for any other instruction."""
    return call.attribute(_TARGET) or "" if call.opcode.startswith("custom-call") else ""


def is_library_call(call: Instruction) -> bool:
    """Returns whether an instruction calls cuBLAS or cuDNN."""
    return call_target(call).startswith(("__cublas$", "__cudnn$"))


def library_contracted_dims(call: Instruction) -> list[int] | None:
    """Returns the dimensions of a cuBLAS product's first operand that are summed over; None for others."""
    if not call_target(call).startswith("__cublas$"):
        return None
    return _numbers(call.attribute(_CONTRACTED))


def convolution_roles(call: Instruction, within: Computation) -> tuple[Shape, Shape, Shape] | None:
    """Returns the input, the kernel and the output of a convolution; None for other instructions.

    cuDNN's backward passes compute the input or the kernel. The labels and the window are those of the
    forward pass all the same.
    """
    target = call_target(call)
    if call.opcode != "convolution" and not target.startswith("__cudnn$conv"):
        return None
    first, second = (within.instructions[name].outputs[0] for name in call.operands[:2])
    if target.startswith("__cudnn$convBackwardInput"):
        return call.results[0], second, first
    if target.startswith("__cudnn$convBackwardFilter"):
        return first, call.results[0], second
    return first, second, call.results[0]


def fused_attention(call: Instruction, within: Computation) -> FusedAttention | None:
    """Returns what a call of cuDNN's attention computes; None for other instructions."""
    target = call_target(call)
    if not target.startswith("__cudnn$fmha"):
        return None
    backward = target.endswith("Backward")
    operands = [within.instructions[name].outputs[0] for name in call.operands]
    return FusedAttention(
        backward=backward,
        scores=tuple(_numbers(call.attribute(_SCORES))),
        head_dim=operands[0].dims[-1],
        bias=operands[_BIAS[backward]] if "Bias" in target else None,
        mask=call.attribute(_MASK) or "NO_MASK",
        segments=int(call.attribute(_SEGMENTS) or 1),
    )


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]
