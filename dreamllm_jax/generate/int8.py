"""int8 weights for generation: the language model's kernels, rounded with one scale per output channel.

A token reads every weight of the language model once, and reading them is nearly all that it costs. In int8
they take half the bytes of bfloat16. Products are still computed in the model's dtype: `x @ (q * scale)` is
`(x @ q) * scale`, and only q is read. Embeddings, norms, the vision tower and the image decoder stay as they
are.

The rounding is ours and not qwix's, which needs the whole model in floating point first. Here one kernel at a
time is read and rounded. Parameters are flat and in the layout of generation (see `layout`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dreamllm_jax.checkpoint.tensors import Derived, Shape, Tensor

_KERNELS = re.compile(r"llama/(layers_\d+/(self_attn|mlp)/\w+_proj|lm_head)/kernel")
_LARGEST = 127


def round_to_int8(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with `kernel` as int8 and `kernel_scale` beside it, float32 [*features].

    Tensors that are not read yet stay so.
    """
    result: dict[str, Any] = {}
    for path, value in params.items():
        if not _KERNELS.fullmatch(path):
            result[path] = value
        elif isinstance(value, Tensor):
            kernel = _Kernel(value)
            result |= {path: kernel, f"{path}_scale": _Scale(value, kernel)}
        else:
            result[path], result[f"{path}_scale"] = rounded(value)
    return result


def rounded(kernel: Any) -> tuple[Any, Any]:
    """Returns a kernel [in, *features] as int8, and the scales [*features] that it must be multiplied by.

    The largest value of a channel becomes 127 or -127, so that an error is at most 1 / 254 of it.
    """
    numpy = np if isinstance(kernel, np.ndarray) else jnp
    values = kernel.astype(np.float32)
    largest = numpy.abs(values).max(0)
    scale = numpy.where(largest > 0, largest / _LARGEST, np.float32(1)).astype(np.float32)
    return numpy.clip(numpy.rint(values / scale), -_LARGEST, _LARGEST).astype(np.int8), scale


@dataclasses.dataclass(frozen=True)
class _Kernel(Derived):
    """The int8 kernel of a tensor; remembers the scales once it is read."""

    scales: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def row_readable(self) -> bool:
        return False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int8)

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        kernel, scale = rounded(self.base.read())
        self.scales[:] = [scale]
        return kernel[start:stop]


@dataclasses.dataclass(frozen=True)
class _Scale(Derived):
    """The scales of an int8 kernel, which is read for them if it was not before."""

    kernel: _Kernel

    @property
    def row_readable(self) -> bool:
        return False

    @property
    def shape(self) -> Shape:
        return self.base.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        if not self.kernel.scales:
            self.kernel.read()
        return self.kernel.scales[0][start:stop]
