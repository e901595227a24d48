"""What matters on GPUs alone: launches, CUDA graphs, copies of weights, float32 products, dense biases, and
what is exchanged while products run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dreamllm_jax.aot.hlo import Program, Thunk
from dreamllm_jax.aot.launches import Launches, Loop, count_launches, loops
from dreamllm_jax.aot.memory import gib
from dreamllm_jax.aot.overlap import Overlap, overlap
from dreamllm_jax.aot.products import attention_calls, float32_products, products
from dreamllm_jax.aot.weights import WeightTraffic, weight_traffic

LISTED = 6  # number of loops that are shown


@dataclasses.dataclass(frozen=True)
class GpuReport:
    """A program on one GPU. `float32_flops` are those of products with a float32 operand, `library_flops`
    those of products and convolutions by cuBLAS and cuDNN.

    Of `attention` calls of cuDNN's attention, `biased` read a dense bias.
    """

    launches: Launches
    loops: tuple[Loop, ...]
    weights: WeightTraffic
    float32_flops: float
    library_flops: float
    attention: int
    biased: int
    overlap: Overlap


def gpu_report(program: Program, thunks: list[Thunk]) -> GpuReport:
    """Returns the report of a program, from its text and the order of its work."""
    calls = attention_calls(program)
    return GpuReport(
        count_launches(thunks, program),
        tuple(loops(thunks, program)),
        weight_traffic(program),
        math.fsum(product.flops for product in float32_products(program)),
        math.fsum(product.flops for product in products(program) if product.library),
        sum(call.times for call in calls),
        sum(call.times for call in calls if call.kernel.bias is not None),
        overlap(program),
    )


def gpu_json(report: GpuReport) -> dict[str, Any]:
    """Returns the report as plain JSON values."""
    return dataclasses.asdict(report) | {"loops": [dataclasses.asdict(loop) for loop in report.loops]}


def gpu_lines(report: GpuReport, flops: float) -> list[str]:
    """Returns the report as lines of text; `flops` are those of all products."""
    launches, weights = report.launches, report.weights
    lines = [
        f"weights: {gib(weights.read)} read; before that {gib(weights.copied)} moved to copy, "
        f"{gib(weights.cast)} to cast them",
        f"of the FLOPs: {report.float32_flops / max(1.0, flops):.1%} in float32, "
        f"{report.library_flops / max(1.0, flops):.1%} by cuBLAS and cuDNN's convolutions",
    ]
    if report.attention:
        lines.append(f"cuDNN's attention: {report.attention:,} calls, {report.biased:,} with a dense bias")
    if report.overlap.all:
        share = report.overlap.hidden / report.overlap.all
        lines.append(f"of the bytes of collectives: {share:.0%} arrive while a product runs")
    lines += [
        f"launched: {_launched(launches)}",
        f"  {launches.in_graphs:,} of them in {launches.graphs:,} CUDA graphs, {launches.outside:,} one by "
        f"one; the host waits {launches.waits:,} times",
    ]
    for loop in sorted(report.loops, key=lambda loop: -loop.turn.outside * (loop.turns or 1))[:LISTED]:
        turns = "a loop whose length depends on data" if loop.turns is None else f"{loop.turns:,} turns"
        where = "in a graph" if loop.in_graph else f"{loop.turn.outside:,} one by one"
        lines.append(f"  {turns}, each {_launched(loop.turn)}, {where}  ({loop.name})")
    return lines


def _launched(launches: Launches) -> str:
    return f"{launches.kernels:,} kernels, {launches.copies:,} copies, {launches.collectives:,} collectives"
