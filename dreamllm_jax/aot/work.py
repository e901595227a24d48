"""The cost of one row or image for a tower in a step: FLOPs and bytes kept for the backward pass, by remat
policy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from dreamllm_jax.config.model import DreamLLMConfig, RematConfig
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat, abstract_params
from dreamllm_jax.sharding import match_rule
from dreamllm_jax.train.flops import count_flops

# A U-Net's layers differ in size. The largest keeps about 1 / UNET_LAYERS of the total: an assumption for
# Stable Diffusion's shapes.
UNET_LAYERS = 10


@dataclasses.dataclass(frozen=True)
class Work:
    """The work for one row (language model) or image. `recomputed`: FLOPs that remat repeats.

    Bytes for the backward pass, without weights: `kept` on the device, `offloaded` to the host, and `layer`,
    which one layer keeps while its own backward pass runs, with any remat policy.
    """

    recomputed: float = 0.0
    kept: float = 0.0
    offloaded: float = 0.0
    layer: float = 0.0


def work(config: DreamLLMConfig, tower: str, remat: str, trained: bool, length: int) -> Work:
    """Returns the work of a tower that gradients flow through, also to its weights if `trained`.

    Traced on shapes alone, with XLA's attention and without the language model's logits.
    """
    config = dataclasses.replace(config, remat=RematConfig())  # one cache key for all policies
    flops, kept, offloaded = _traced(config, tower, remat, trained, length)
    least, all_kept, _ = _traced(config, tower, "none", trained, length)
    return Work(max(0.0, flops - least), kept, offloaded, all_kept / _layers(config, tower))


def _layers(config: DreamLLMConfig, tower: str) -> int:
    """Returns how many times a tower keeps the bytes of its largest layer."""
    if tower == "unet":
        return UNET_LAYERS
    return getattr(config, tower).num_hidden_layers


@functools.lru_cache(maxsize=64)
def _traced(
    config: DreamLLMConfig, tower: str, remat: str, trained: bool, length: int
) -> tuple[float, float, float]:
    """Returns the FLOPs of both passes, the bytes kept, and the bytes offloaded."""
    policy = dataclasses.replace(config.remat, **{tower: remat})
    module = DreamLLMModule(dataclasses.replace(_without_kernels(config), remat=policy))
    dtype = jnp.dtype(config.dtype)
    weights = {
        path: jax.ShapeDtypeStruct(x.shape, dtype if match_rule(path)[1] else x.dtype)  # cast as in a step
        for path, x in _params(config).items()
        if path.split("/")[0] in (tower, f"{tower}_projector")
    }
    method, shapes, argnum = _call(config, tower, length)

    def run(weights: Flat, driven: Any) -> Any:
        given = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), x) for x in shapes]
        given[argnum] = driven
        return module.apply({"params": unflatten_dict(weights, sep="/")}, *given, method=method)

    def both(weights: Flat, driven: Any) -> Any:
        inputs = (weights, driven) if trained else (driven,)
        out, pull = jax.vjp(lambda *x: run(*(x if trained else (weights, *x))), *inputs)
        return jax.tree.leaves(pull), pull(jax.tree.map(jnp.ones_like, out))

    jaxpr, (residuals, _) = jax.make_jaxpr(both, return_shape=True)(weights, shapes[argnum])
    known = {(x.shape, x.dtype) for x in weights.values()}
    held = {jax.memory.Space.Device: 0.0, jax.memory.Space.Host: 0.0}
    for aval in {id(v): v.aval for v in jaxpr.jaxpr.outvars[: len(residuals)]}.values():
        if (aval.shape, aval.dtype) not in known:
            held[aval.memory_space] += math.prod(aval.shape) * aval.dtype.itemsize
    return count_flops(jaxpr.jaxpr), held[jax.memory.Space.Device], held[jax.memory.Space.Host]


@functools.lru_cache(maxsize=2)
def _params(config: DreamLLMConfig) -> Flat:
    return abstract_params(config)


def _without_kernels(config: DreamLLMConfig) -> DreamLLMConfig:
    """Returns the config with chunked attention, which keeps about as much as kernels do; kernels are not
    traced.
    """
    kinds = {k: v if v in ("xla", "auto") else "chunked" for k, v in vars(config.attention).items()}
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **kinds))


def _call(config: DreamLLMConfig, tower: str, length: int) -> tuple[Any, list[Any], int]:
    """Returns the tower's method, the shapes of its inputs, and the index of the input that gradients flow
    to.
    """

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))

    if tower == "llama":
        assert config.llama is not None
        ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return (lambda m, *x: m.llama(*x)), [floats(1, length, config.llama.hidden_size), ints, ints], 0
    if tower == "vision":
        assert config.vision is not None
        side = config.vision.image_size
        return DreamLLMModule.see, [floats(1, side, side, 3)], 0
    assert tower == "unet" and config.unet is not None
    size, added = config.latent_size, None
    if config.unet.pooled_text_dim is not None:
        times = jax.ShapeDtypeStruct((1, 6), jnp.int32)
        added = {"text_embeds": floats(1, config.unet.pooled_text_dim), "time_ids": times}
    context = floats(1, config.num_dream_queries, config.unet.cross_attention_dim)
    steps = jax.ShapeDtypeStruct((1,), jnp.int32)
    return DreamLLMModule.denoise, [floats(1, size, size, config.unet.in_channels), steps, context, added], 2
