"""Which implementation of attention runs: the one place where that is decided."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from dreamllm_jax.config.model import AttentionKernel
from dreamllm_jax.models.attention import splash
from dreamllm_jax.models.attention.masks import Mask

# What "auto" is, by platform: the reference, until `benchmarks.kernels` has shown on one that a kernel is
# faster there.
DEFAULTS: dict[str, AttentionKernel] = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}

# Attention with fewer queries or keys is left to XLA: its scores are small (a drawn picture's 64 dream
# queries or 77 words as keys, the coarse levels of the U-Net, one new token on a cache).
LONG = 512

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}


def chosen(
    wanted: AttentionKernel,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: Any,
    mask: Mask | None,
    platform: str,
) -> AttentionKernel:
    """The implementation for attention of this shape under this mask on this platform ("cpu", "gpu", "tpu").

        short         xla, whatever is wanted: fewer than 512 queries or keys
        key lengths   chunked instead of a kernel, none of which takes them: long prompts on a cache
        auto          the platform's default (`DEFAULTS`)
        lean          what holds the fewest scores: splash on TPUs, chunked elsewhere
        else          what is wanted

    Raises:
      ValueError: a kernel was asked for that the platform does not have, or that is not made for the type or
        the width of the heads.
    """
    if wanted == "auto":
        wanted = DEFAULTS[platform] if platform in DEFAULTS else "xla"
    if wanted == "lean":
        wanted = "splash" if platform == "tpu" else "chunked"
    if min(queries, keys) < LONG or wanted == "xla":
        return "xla"
    if wanted == "chunked":
        return wanted
    if platform != PLATFORMS[wanted]:
        raise ValueError(
            f"model.attention asks for {wanted!r}, a kernel of {PLATFORMS[wanted]}s; the program is for "
            f"{platform}: choose 'auto', 'xla', 'chunked' or 'lean'."
        )
    if wanted == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or head_dim > 128 or head_dim % 8):
        raise ValueError(
            f"model.attention asks for 'cudnn' with heads of {head_dim} {jnp.dtype(dtype).name}s; it takes "
            "bfloat16 and widths up to 128 that 8 divides: set model.dtype='bfloat16', or choose another for "
            "this tower."
        )
    return wanted if splash.supports(mask) else "chunked"
