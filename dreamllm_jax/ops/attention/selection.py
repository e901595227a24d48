"""The one place that decides which implementation of attention runs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.ops.attention import cudnn, splash
from dreamllm_jax.ops.attention.masks import Mask

# The meaning of "auto" on each platform. On an H200, cuDNN took 0.21 to 0.36 of XLA's time
# (`benchmarks.kernels`). On TPUs it is the reference, until that benchmark has shown that splash is faster.
DEFAULTS: dict[str, AttentionKernel] = {"cpu": "xla", "gpu": "cudnn", "tpu": "xla"}
LEAN: dict[str, AttentionKernel] = {"cpu": "chunked", "gpu": "cudnn", "tpu": "splash"}

# With fewer queries or keys than this, splash and chunked give way to XLA: the scores are small. Examples are
# the 64 dream queries or 77 text tokens as keys of the U-Net, its coarse levels, and a new token on a cache.
MIN_KERNEL_LENGTH = 512

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def select_implementation(
    wanted: AttentionKernel,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: Any,
    mask: Mask | None,
    platform: str,
) -> AttentionKernel:
    """Returns the implementation for attention of this shape and mask on a platform ("cpu", "gpu" or "tpu").

    "auto" stands for the platform's default (`DEFAULTS`): cuDNN on GPUs, else XLA. "lean" stands for the
    implementation that holds the fewest scores (`LEAN`): splash on TPUs, cuDNN on GPUs, else chunked. Where
    cuDNN does not take the dtype or the head width, they stand for XLA and chunked. Of these rows, the first
    that applies decides:

        cudnn, with more than one query           cudnn, unless it has a mask and an odd length
        fewer than 512 queries or keys            xla, whatever is wanted
        splash with key lengths, cudnn that is    chunked: the kernel does not take them
          left over
        everything else                           what is wanted

    Raises:
      ValueError: the wanted kernel does not exist on the platform, or does not take the dtype or the head
        width.
    """
    if wanted in ("auto", "lean"):
        of_platform, otherwise = (DEFAULTS, "xla") if wanted == "auto" else (LEAN, "chunked")
        wanted = of_platform[platform] if platform in of_platform else otherwise
        if wanted == "cudnn" and not cudnn.supports_heads(dtype, head_dim):
            wanted = otherwise
    elif wanted in PLATFORMS and platform == PLATFORMS[wanted] == "gpu":
        _check_heads(dtype, head_dim)
    if wanted == "cudnn" and platform == "gpu" and cudnn.supports_lengths(queries, keys, mask):
        return "cudnn"
    if min(queries, keys) < MIN_KERNEL_LENGTH or wanted == "xla":
        return "xla"
    if wanted == "chunked":
        return wanted
    if platform != PLATFORMS[wanted]:
        raise ValueError(
            f"model.attention asks for {wanted!r}, a kernel for {PLATFORMS[wanted].upper()}s, but the "
            f"program is for {platform}: choose 'auto', 'xla', 'chunked' or 'lean'."
        )
    return wanted if wanted == "splash" and splash.supports_mask(mask) else "chunked"


def _check_heads(dtype: Any, head_dim: int) -> None:
    if not cudnn.supports_heads(dtype, head_dim):
        raise ValueError(
            f"model.attention asks for 'cudnn' with {jnp.dtype(dtype).name} heads of width {head_dim}, but "
            "it takes bfloat16 and multiples of 8 up to 128: set model.dtype='bfloat16', or choose another "
            "implementation for this tower."
        )
