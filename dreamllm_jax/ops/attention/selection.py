"""The one place that decides which implementation of attention runs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.ops.attention.masks import Mask
from dreamllm_jax.ops.attention.splash import supports_mask

# The meaning of "auto" on each platform: the reference, until `benchmarks.kernels` has shown on such a device
# that a kernel is faster.
DEFAULTS: dict[str, AttentionKernel] = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}

# With fewer queries or keys than this, XLA is used: the scores are small. Examples are the 64 dream queries
# or 77 text tokens as keys of the U-Net, its coarse levels, and one new token on a cache.
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

    "auto" stands for the platform's default (`DEFAULTS`). "lean" stands for the implementation that holds the
    fewest scores: splash on TPUs, chunked elsewhere. Of these rows, the first that applies decides:

        fewer than 512 queries or keys      xla, whatever is wanted
        splash or cudnn with key lengths    chunked: neither kernel takes them (a long prompt on a cache)
        everything else                     what is wanted

    Raises:
      ValueError: the wanted kernel does not exist on the platform, or does not take the dtype or the head
        width.
    """
    if wanted == "auto":
        wanted = DEFAULTS[platform] if platform in DEFAULTS else "xla"
    if wanted == "lean":
        wanted = "splash" if platform == "tpu" else "chunked"
    if min(queries, keys) < MIN_KERNEL_LENGTH or wanted == "xla":
        return "xla"
    if wanted == "chunked":
        return wanted
    if platform != PLATFORMS[wanted]:
        raise ValueError(
            f"model.attention asks for {wanted!r}, a kernel for {PLATFORMS[wanted].upper()}s, but the "
            f"program is for {platform}: choose 'auto', 'xla', 'chunked' or 'lean'."
        )
    if wanted == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or head_dim > 128 or head_dim % 8):
        raise ValueError(
            f"model.attention asks for 'cudnn' with {jnp.dtype(dtype).name} heads of width {head_dim}, but "
            "it takes bfloat16 and multiples of 8 up to 128: set model.dtype='bfloat16', or choose another "
            "implementation for this tower."
        )
    return wanted if supports_mask(mask) else "chunked"
