"""FLOPs of single instructions of a compiled program: matrix products, convolutions, Pallas kernels."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping

import numpy as np

from dreamllm_jax.aot.hlo import Instruction, Shape

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
# Scores and their sum of values; with gradients of queries, or of keys and values, the scores are made again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^}]*\})')


def flops(instruction: Instruction, operands: list[Shape]) -> float:
    """FLOPs of an instruction by itself; a multiply-add is 2. 0 for all but those named above."""
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands)
    if instruction.opcode == "dot":
        found = _CONTRACTED.search(instruction.attributes)
        contracted = [int(i) for i in found.group(1).split(",") if i] if found else []
        return 2.0 * instruction.results[0].elements * math.prod(operands[0].dims[i] for i in contracted)
    if instruction.opcode == "custom-call":
        return float(estimate(instruction)["flops"]) or _splash(instruction, operands)
    return 0.0


def estimate(instruction: Instruction) -> Mapping[str, float]:
    """`flops` and `bytes_accessed` that a Pallas kernel says of itself; zeros where it says nothing."""
    said = {"flops": 0.0, "bytes_accessed": 0.0}
    if found := _ESTIMATE.search(instruction.attributes):
        said |= {k: float(v) for k, v in json.loads(found.group(1)).items() if k in said}
    return said


def _splash(instruction: Instruction, operands: list[Shape]) -> float:
    """JAX's splash attention, which says nothing of itself: its products, as if nobody were hidden.

    Queries [..., N, L, H] and keys [..., K, S, H] are its first operands of floats. 0 for other kernels.
    """
    found = _SPLASH.match(instruction.name)
    if found is None:
        return 0.0
    queries, keys = [s for s in operands if len(s.dims) >= 3 and "f" in s.dtype][:2]
    return 2.0 * _SPLASH_PRODUCTS[found.group(1)] * queries.elements * keys.dims[-2]


def _convolution(instruction: Instruction, operands: list[Shape]) -> float:
    """TPUs write matrix products so, too; then batch dimensions are spatial ones, dilated or padded.

    Counted are the products that meet an element of the input: none of the padding, none of the holes of
    a dilation.
    """
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, instruction.attributes[:200]
    lhs, rhs, out = labels.groups()
    window = _window(instruction.attributes, sum(c.isdigit() for c in out))
    output = instruction.results[0].dims
    total = output[out.index("b")] * output[out.index("f")] * operands[1].dims[rhs.index("i")]
    for axis, settings in enumerate(window):
        size_in, size_out = operands[0].dims[lhs.index(str(axis))], output[out.index(str(axis))]
        total *= _meetings(size_in, size_out, *settings)
    return 2.0 * total


def _window(attributes: str, axes: int) -> list[tuple[int, int, int, int, int]]:
    """Of each spatial axis: size, stride, padding before, dilations of input and kernel."""
    found = _WINDOW.search(attributes)
    text = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def numbers(name: str, unset: str) -> list[int]:
        listed = text[name].split("x") if name in text else [unset] * axes
        return [int(item.split("_")[0]) for item in listed]

    return list(
        zip(
            numbers("size", "1"),
            numbers("stride", "1"),
            numbers("pad", "0_0"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
            strict=True,
        )
    )


@functools.lru_cache(maxsize=4096)
def _meetings(
    size_in: int, size_out: int, kernel: int, stride: int, before: int, dilation: int, kernel_dilation: int
) -> int:
    """How often, along one axis, a place of the kernel meets an element of the input."""
    places = np.arange(size_out)[:, None] * stride + np.arange(kernel) * kernel_dilation - before
    inside = (places >= 0) & (places <= (size_in - 1) * dilation) & (places % dilation == 0)
    return int(inside.sum())
