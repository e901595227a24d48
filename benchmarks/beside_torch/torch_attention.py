"""PyTorch's attention on the shapes of `benchmarks.kernels`: the forward and backward passes."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch.nn import functional as F

from benchmarks.beside_torch import rows
from benchmarks.beside_torch.timing import Work
from benchmarks.kernels import Arrays, Case


def row(side: rows.Side, name: str, case: Case, arrays: Arrays) -> rows.Row:
    """Returns `scaled_dot_product_attention`, with a boolean mask where rows are packed."""
    q, k, v, output_gradient = (
        torch.from_dlpack(jax.block_until_ready(x)).to(side.torch_settings.device).transpose(1, 2)
        for x in arrays[:4]
    )
    q, k, v = (x.contiguous().requires_grad_() for x in (q, k, v))
    seen = rows.visible(case, arrays[4])
    mask = None if seen is None else side.tensor(seen)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=case.heads != case.kv_heads)

    call: Any = torch.compile(attend, dynamic=False) if side.torch_settings.compiled else attend

    def run() -> torch.Tensor:
        out = call(q, k, v)
        out.backward(output_gradient)
        for x in (q, k, v):
            x.grad = None
        if side.device == "gpu":
            torch.cuda.synchronize()
        return out

    work = Work(run)
    out = run().detach().transpose(1, 2).float().cpu().numpy()
    work.seconds()
    return rows.Row(name, side.name, work, {"attention": rows.valid(case, arrays, out)})
