"""The scaling factor of a freshly trained VAE."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Num

from dreamllm_jax import distributed
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat


def with_measured_scale(
    config: DreamLLMConfig, params: Flat, images: Num[Any, "B J h w 3"]
) -> DreamLLMConfig:
    """Returns the config with the scaling factor that gives the VAE's latents unit variance.

    The factor is 1 / std(z), measured on `images` (arXiv 2112.10752, section G). The posterior of a latent
    has mean m and variance exp(l), so that var(z) = var(m) + E[exp(l)].
    """
    assert config.vae is not None
    flat = jnp.asarray(images).reshape(-1, *images.shape[2:])
    encode = jax.jit(functools.partial(DreamLLMModule(config).apply, method=DreamLLMModule.encode_image))
    vae = {k: v for k, v in params.items() if k.startswith("vae/")}
    vae = {k: distributed.to_host(v) if isinstance(v, jax.Array) else v.read() for k, v in vae.items()}
    moments = encode({"params": unflatten_dict(vae, sep="/")}, flat)
    mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
    deviation = float(np.sqrt(mean.var() + np.exp(logvar).mean()))
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=1.0 / deviation))
