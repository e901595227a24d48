"""Writes the `.bin` files of the reference's plugins with `torch.save`.

The reference loads its plugins with `torch.load`, from such files only; everything else is exported as
safetensors. This is the only module of the package that needs PyTorch, and it imports it only to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dreamllm_jax.checkpoint.tensors import DTYPE_NAMES, DTYPES, Tensor, contiguous, num_bytes

# Older releases of PyTorch cannot load the others: float8 and the wide unsigned integers.
_WRITABLE = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64")


def require_torch() -> None:
    """Checks that PyTorch can be imported.

    Raises:
      ValueError: PyTorch cannot be imported; the message says what to install.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "The plugin files of a DreamLLM (.bin) are written with PyTorch, which cannot be imported "
            f"({error}); run pip install 'dreamllm-jax[torch]'."
        ) from None


def write_torch_file(
    file: str | Path, tensors: Mapping[str, Tensor], progress: Callable[[int], None] = lambda count: None
) -> None:
    """Writes a state dict that `torch.load(file, weights_only=True)` reads.

    `torch.save` takes tensors that are in memory, so this takes as much memory as the file has bytes: 1.9 GB
    for the decoder of Stable Diffusion 2.1 in bfloat16, 3.8 GB in float32; twice for one tensor at a time.
    `progress` is called with the number of bytes after each tensor.

    Raises:
      ValueError: PyTorch is not installed, or a dtype cannot be written.
    """
    require_torch()
    import torch

    for tensor in tensors.values():
        if DTYPE_NAMES[tensor.dtype] not in _WRITABLE:
            raise ValueError(
                f"{tensor.origin}: dtype {tensor.dtype} cannot be written to a .bin file; use --dtype."
            )
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        values = contiguous(tensor.read()).reshape(tensor.shape)
        values = values if values.flags.writeable else values.copy()
        if tensor.dtype == DTYPES["BF16"]:  # a dtype that PyTorch does not take from numpy
            state[name] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(values)
        progress(num_bytes(tensor))
    torch.save(state, file)
