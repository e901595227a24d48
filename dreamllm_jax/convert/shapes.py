"""The parameters that a model's config implies: path -> shape, without allocating any."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.convert.tensors import Shape
from dreamllm_jax.models.clip import ClipText, ClipVision, ContrastiveHead
from dreamllm_jax.models.connectors import DreamQueries, GlobalProjector, Projector
from dreamllm_jax.models.llama import Llama
from dreamllm_jax.models.unet import UNet
from dreamllm_jax.models.vae import Vae


def expected_shapes(config: DreamLLMConfig) -> dict[str, Shape]:
    """Every parameter of the model, in the order of its towers."""
    shapes: dict[str, Shape] = {}
    for tower, (module, arguments) in modules(config).items():
        tree = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
        leaves = flatten_dict(tree, sep="/")
        shapes.update({f"{tower}/{path}": tuple(leaf.shape) for path, leaf in leaves.items()})
    return shapes


def modules(c: DreamLLMConfig) -> dict[str, tuple[nn.Module, tuple]]:
    """Every tower and connector with arguments to initialize it with."""
    towers: dict[str, tuple[nn.Module, tuple]] = {}
    tokens = jnp.zeros((1, 2), jnp.int32)
    if c.llama is not None:
        states = jnp.zeros((1, 2, c.llama.hidden_size))
        towers["llama"] = Llama(c.llama), (states, tokens, tokens + 1)
    if c.vision is not None:
        pixels = jnp.zeros((1, c.vision.image_size, c.vision.image_size, c.vision.num_channels))
        towers["vision"] = ClipVision(c.vision), (pixels,)
    if c.llama is not None and c.vision is not None:
        patches = jnp.zeros((1, c.vision.num_patches, c.vision.hidden_size))
        towers["vision_projector"] = Projector(c.vision_projector, c.llama.hidden_size), (patches,)
    if c.draws:
        assert c.llama is not None and c.unet is not None
        queries = jnp.zeros((1, c.num_dream_queries, c.llama.hidden_size))
        towers["dream_queries"] = DreamQueries(c.num_dream_queries, c.llama.hidden_size), ()
        towers["condition_projector"] = (
            Projector(c.condition_projector, c.unet.cross_attention_dim),
            (queries,),
        )
        if c.unet.pooled_text_dim is not None:
            towers["global_projector"] = GlobalProjector(c.unet.pooled_text_dim), (queries,)
    towers.update(_diffusion(c))
    if c.text is not None:
        towers["text"] = ClipText(c.text), (tokens,)
    if c.contrastive:
        assert c.vision is not None and c.text is not None
        pooled = (jnp.zeros((1, c.vision.hidden_size)), jnp.zeros((1, c.text.hidden_size)))
        towers["contrastive"] = ContrastiveHead(c.text.projection_dim), pooled
    return towers


def _diffusion(c: DreamLLMConfig) -> dict[str, tuple[nn.Module, tuple]]:
    if c.unet is None or c.vae is None:
        return {}
    size = 2 ** len(c.unet.block_out_channels)
    latents = jnp.zeros((1, size, size, c.unet.in_channels))
    context = jnp.zeros((1, 2, c.unet.cross_attention_dim))
    added = None
    if c.unet.pooled_text_dim is not None:
        added = {"text_embeds": jnp.zeros((1, c.unet.pooled_text_dim)), "time_ids": jnp.zeros((1, 6))}
    pixels = jnp.zeros((1, size * c.vae.downscale, size * c.vae.downscale, c.vae.in_channels))
    return {
        "unet": (UNet(c.unet), (latents, jnp.zeros((1,), jnp.int32), context, added)),
        "vae": (Vae(c.vae), (pixels,)),
    }
