"""Conditions to images: guided sampling and the VAE's decoder, compiled once per batch size and sampler."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.diffusion.sampling import guided, sample
from dreamllm_jax.diffusion.schedule import row_normal
from dreamllm_jax.distributed import to_host
from dreamllm_jax.generate.engine import Engine
from dreamllm_jax.models.dreamllm import DreamLLMModule

# The U-Net's context and, for SDXL, its pooled condition: of M images, and of the empty or negative prompt.
Condition = tuple[Float[Array, "M Q X"], Float[Array, "M G"] | None]
UnconditionalState = tuple[Float[Array, "1 Q X"], Float[Array, "1 G"] | None]

# How many images are drawn at once. The sizes are few because each is compiled separately.
BATCH_SIZES = (1, 4, 16)


def draw_in_batches(
    engine: Engine,
    condition: Condition,
    rows: np.ndarray,
    keys: jax.Array,
    settings: GenerationConfig,
    unconditional: UnconditionalState | None,
) -> np.ndarray:
    """Draws one image for each entry of `rows`, an index into the conditions, in batches of `BATCH_SIZES`.

    Returns:
      uint8 [n, h, w, 3], on the host of every process.
    """
    images, begin = [], 0
    for size in batch_sizes(len(rows)):
        chosen = rows[begin : begin + size]
        padded = np.resize(chosen, size)
        chosen_keys = keys[np.resize(np.arange(begin, begin + len(chosen)), size)]
        part = jax.tree.map(lambda x, p=padded: x[p], condition)
        null = part
        if unconditional is not None:
            null = jax.tree.map(lambda x, n=size: jnp.broadcast_to(x, (n, *x.shape[1:])), unconditional)
        drawn = draw_images(engine.params, part, null, chosen_keys, settings, engine.module)
        images.append(to_host(drawn)[: len(chosen)])
        begin += size
    return np.concatenate(images)


def batch_sizes(images: int) -> list[int]:
    """Splits a number of images into batches of `BATCH_SIZES`, largest first.

    Only the last batch is padded, and only if at most a quarter of it is padding. For example 3 -> [4],
    6 -> [4, 1, 1], 13 -> [16].
    """
    sizes, left = [], images
    while left > 0:
        filled = [size for size in BATCH_SIZES if 4 * left >= 3 * size]
        sizes.append(max(filled, default=BATCH_SIZES[0]))
        left -= sizes[-1]
    return sizes


def draw_images(
    params: dict,
    condition: Condition,
    unconditional: Condition,
    keys: Key[Array, "M"],
    settings: GenerationConfig,
    model: DreamLLMModule,
) -> UInt8[Array, "M h w 3"]:
    """Draws one image per condition. An image depends on its own condition and key only."""
    return _draw(
        params,
        condition,
        unconditional,
        keys,
        jnp.float32(settings.guidance_scale),
        jnp.float32(settings.guidance_rescale),
        model=model,
        plan=(settings.sampler, settings.num_inference_steps, settings.eta),
        guide=settings.guidance_scale != 1,
    )


@functools.partial(jax.jit, static_argnames=("model", "plan", "guide"))
def _draw(params, condition, unconditional, keys, scale, rescale, *, model, plan, guide):
    c = model.config
    variables = {"params": params}
    size = c.latent_size
    fold = jax.vmap(jax.random.fold_in, (0, None))
    init = row_normal(fold(keys, 0), (size, size, c.unet.in_channels))
    both = (
        jax.tree.map(lambda u, x: jnp.concatenate([u, x]), unconditional, condition) if guide else condition
    )
    context, pooled = both
    added = None
    if pooled is not None:
        ids = jnp.asarray([c.image_size, c.image_size, 0, 0, c.image_size, c.image_size])
        added = {"text_embeds": pooled, "time_ids": jnp.broadcast_to(ids, (pooled.shape[0], 6))}

    def denoise(latents, timesteps):
        return model.apply(variables, latents, timesteps, context, added, method=DreamLLMModule.denoise)

    sampler, steps, eta = plan
    latents = sample(
        guided(denoise, scale, rescale) if guide else denoise,
        init,
        c.schedule,
        sampler=sampler,
        num_steps=steps,
        eta=eta,
        keys=fold(keys, 1),
    )
    return model.apply(variables, latents, method=DreamLLMModule.decode_image)
