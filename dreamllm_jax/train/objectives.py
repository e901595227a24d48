"""The objectives of stages: DreamLLM's joint loss, and the three with which stage 0 trains the towers.

An objective maps (model, params, batch, step_noise, loss config, counts) to (loss, metrics). `counts` are
those of the *global* batch. Results therefore add up over micro-batches, hosts and devices:

    a batch of two micro-batches with 3 and 1 supervised tokens, of cross-entropies 1, 2, 3 and 6 nats:
    counts.tokens = 4, and the parts are (1 + 2 + 3) / 4 = 1.5 and 6 / 4 = 1.5; the loss is their sum, 3.0.
"""

from __future__ import annotations

import typing
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.diffusion import schedule as diffusion
from dreamllm_jax.models.dreamllm import DreamLLMModule, query_states
from dreamllm_jax.models.vae import sample_latents
from dreamllm_jax.sharding import constrain
from dreamllm_jax.train.cross_entropy import chunked_cross_entropy
from dreamllm_jax.train.losses import (
    contrastive_loss,
    distillation_errors,
    kl_to_unit_gaussian,
    loss_scale,
)


@typing.no_type_check  # single rows and shapes travel in the same container
@flax.struct.dataclass
class StepNoise:
    """All random numbers of a step, a function of (seed, step, row) alone.

    `latent_noise` samples the VAE's posterior; `noise` and `offset` (one value per channel) noise the
    latents; `perturbation` perturbs the U-Net's input (arXiv 2301.11706). `dropped` marks dreams without
    condition.
    """

    latent_noise: Float[Any, "B J h w c"]
    noise: Float[Any, "B J h w c"]
    offset: Float[Any, "B J 1 1 c"]
    perturbation: Float[Any, "B J h w c"]
    timesteps: Int[Any, "B J"]
    dropped: Bool[Any, "B J"]


@typing.no_type_check
@flax.struct.dataclass
class LossCounts:
    """The divisors of the losses: supervised tokens (by weight), dreams and rows of the global batch."""

    tokens: Float[Any, ""]
    dreams: Float[Any, ""]
    rows: Float[Any, ""]


def loss_counts(batch: Batch) -> LossCounts:
    """Returns the counts of a batch, at least 1 each: without dreams their loss is 0 / 1."""
    return LossCounts(
        tokens=jnp.maximum(batch.loss_weights.sum(), 1.0),
        dreams=jnp.maximum(batch.dream_mask.sum().astype(jnp.float32), 1.0),
        rows=jnp.float32(batch.tokens.shape[0]),
    )


def sample_noise(keys: Array, dreams: int, model: DreamLLMConfig, config: LossConfig) -> StepNoise | None:
    """Returns the random numbers of rows with these keys; None for a model without a U-Net."""
    if model.unet is None:
        return None
    assert model.vae is not None
    latents = (dreams, model.latent_size, model.latent_size, model.vae.latent_channels)

    def sample_row(key: Array) -> StepNoise:
        k = jax.random.split(key, 6)
        return StepNoise(
            latent_noise=jax.random.normal(k[0], latents),
            noise=jax.random.normal(k[1], latents),
            offset=jax.random.normal(k[2], (dreams, 1, 1, latents[-1])),
            perturbation=jax.random.normal(k[3], latents),
            timesteps=sample_timesteps(k[4], dreams, model.schedule.num_train_timesteps, config),
            dropped=jax.random.bernoulli(k[5], config.condition_dropout, (dreams,)),
        )

    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), jax.vmap(sample_row)(keys))


def sample_timesteps(key: Array, number: int, steps: int, config: LossConfig) -> Int[Array, " n"]:
    """Returns diffusion timesteps in [0, steps): uniform, or (1 - u^3) steps for uniform u ("cubic")."""
    if config.timestep_sampling == "uniform":
        return jax.random.randint(key, (number,), 0, steps)
    u = jax.random.uniform(key, (number,))
    return jnp.clip((1 - u**3) * steps, 0, steps - 1).astype(jnp.int32)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def denoising_errors(
    model: DreamLLMModule,
    params: dict,
    batch: Batch,
    step_noise: StepNoise,
    config: LossConfig,
    context: Float[Array, "M S X"],
    pooled: Float[Array, "M G"] | None,
) -> Float[Array, "B J"]:
    """Returns each dream's weighted denoising error given its context, and 0 for empty dream slots.

        w(t) * mean || U(z_t, t, context) - target ||^2,   z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps

    z_0 are the VAE's latents of the dream, eps the noise with its offset, and the target is eps, the velocity
    or z_0, as the schedule says. M = B J; `pooled` is SDXL's pooled text embedding.
    """
    assert batch.dream_images is not None and model.config.vae is not None
    c = model.config.schedule
    table = diffusion.make_schedule(c)
    moments = model.apply({"params": params}, _flat(batch.dream_images), method=DreamLLMModule.encode_image)
    latents = sample_latents(
        moments.astype(jnp.float32), _flat(step_noise.latent_noise), model.config.vae.scaling_factor
    )
    noise = _flat(step_noise.noise) + config.noise_offset * _flat(step_noise.offset)
    t = step_noise.timesteps.reshape(-1)
    noisy = diffusion.add_noise(
        table, latents, noise + config.input_perturbation * _flat(step_noise.perturbation), t
    )
    added = None
    if pooled is not None:
        assert batch.dream_sizes is not None
        added = {"text_embeds": pooled, "time_ids": _flat(batch.dream_sizes)}
    prediction = model.apply({"params": params}, noisy, t, context, added, method=DreamLLMModule.denoise)
    target = diffusion.prediction_target(table, c, latents, noise, t)
    weights = diffusion.loss_weights(table, c, t, config.snr_gamma)
    errors = distillation_errors(prediction, target, weights).reshape(batch.dream_mask.shape)
    return jnp.where(batch.dream_mask, errors, 0.0)


def drop_conditions(x: Array, dropped: Bool[Array, "B J"], null_dream: Int[Array, "B"]) -> Array:
    """Returns the conditions [B, J, ...] after condition dropout: a dropped one becomes the empty prompt's.

    This is the condition dropout of classifier-free guidance (arXiv 2207.12598). `null_dream[b]` is the index
    of the row's dream for the empty prompt, or -1 if the row has none; then nothing is replaced in it. A row
    with conditions [c0, c1, c2], dropped = [1, 0, 0] and null_dream = 2 becomes [c2, c1, c2].
    """
    null = x[jnp.arange(x.shape[0]), jnp.maximum(null_dream, 0)][:, None]
    use = (dropped & (null_dream >= 0)[:, None]).reshape(dropped.shape + (1,) * (x.ndim - 2))
    return jnp.where(use, null, x)


def joint_objective(
    model: DreamLLMModule,
    params: dict,
    batch: Batch,
    step_noise: StepNoise | None,
    config: LossConfig,
    counts: LossCounts,
) -> tuple[Array, dict[str, Array]]:
    """Returns DreamLLM's loss (arXiv 2309.11499, equations 4 to 6).

    L = (w_lm * CE / tokens + w_vm * denoising error / dreams) / loss_scale
    """
    variables = {"params": params}
    hidden = model.apply(variables, batch, method=DreamLLMModule.read)
    loss, metrics = jnp.zeros((), jnp.float32), {}
    if config.weight_lm:
        nll, right = chunked_cross_entropy(
            model.apply(variables, method=DreamLLMModule.head),
            hidden,
            batch.targets,
            batch.loss_weights,
            config.logits_chunk,
            model.tables_gathered,
        )
        metrics["loss_lm"], metrics["token_accuracy"] = nll / counts.tokens, right / counts.tokens
        loss += config.weight_lm * metrics["loss_lm"]
    if config.weight_vm and model.config.draws and batch.dream_mask.shape[1]:
        assert step_noise is not None
        rows, dreams = batch.dream_mask.shape
        states = query_states(hidden, batch.dream_slots, dreams, model.config.num_dream_queries)
        if config.condition_dropout:
            states = drop_conditions(states, step_noise.dropped, batch.null_dream)
        context, pooled = model.apply(variables, _flat(states), method=DreamLLMModule.conditions)
        errors = denoising_errors(model, params, batch, step_noise, config, context, pooled)
        metrics["loss_vm"] = errors.sum() / counts.dreams
        loss += config.weight_vm * metrics["loss_vm"]
    metrics["loss"] = loss / loss_scale(config)
    return metrics["loss"], metrics


def diffusion_objective(
    model: DreamLLMModule,
    params: dict,
    batch: Batch,
    step_noise: StepNoise | None,
    config: LossConfig,
    counts: LossCounts,
) -> tuple[Array, dict[str, Array]]:
    """Returns the denoising loss given the text tower's states (Stable Diffusion, arXiv 2112.10752)."""
    assert step_noise is not None
    dreams = batch.dream_mask.shape[1]
    context = model.apply({"params": params}, batch.tokens, method=DreamLLMModule.read_caption)
    context = jnp.repeat(context, dreams, axis=0)
    errors = denoising_errors(model, params, batch, step_noise, config, context, None)
    loss = errors.sum() / counts.dreams
    return loss, {"loss_vm": loss}


def vae_objective(
    model: DreamLLMModule,
    params: dict,
    batch: Batch,
    step_noise: StepNoise | None,
    config: LossConfig,
    counts: LossCounts,
) -> tuple[Array, dict[str, Array]]:
    """Returns the VAE's loss per image: mean |x' - x| + mean (x' - x)^2 + kl_weight * KL (arXiv 1312.6114).

    Adversarial and perceptual losses are left out: they would need another network.
    """
    assert step_noise is not None and batch.dream_images is not None
    pixels, image, mean, logvar = model.apply(
        {"params": params},
        _flat(batch.dream_images),
        _flat(step_noise.latent_noise),
        method=DreamLLMModule.reconstruct,
    )
    mask = batch.dream_mask.reshape(-1)
    error = jnp.abs(image - pixels) + jnp.square(image - pixels)
    reconstruction = jnp.sum(error.mean(axis=(1, 2, 3)) * mask) / counts.dreams
    kl = jnp.sum(kl_to_unit_gaussian(mean, logvar) * mask) / counts.dreams
    metrics = {
        "loss_reconstruction": reconstruction,
        "kl": kl,
        "latent_square": jnp.sum(jnp.square(mean).mean(axis=(1, 2, 3)) * mask) / counts.dreams,
    }
    return reconstruction + config.kl_weight * kl, metrics


def contrastive_objective(
    model: DreamLLMModule,
    params: dict,
    batch: Batch,
    step_noise: StepNoise | None,
    config: LossConfig,
    counts: LossCounts,
) -> tuple[Array, dict[str, Array]]:
    """Returns CLIP's contrastive loss between the first image of each row and its text (arXiv 2103.00020)."""
    assert batch.images is not None
    image, text, scale = model.apply(
        {"params": params}, batch.images[:, 0], batch.tokens, method=DreamLLMModule.contrast
    )
    same = (batch.tokens[:, None] == batch.tokens[None]).all(-1).astype(jnp.float32)
    total, right = contrastive_loss(image, text, scale, same)
    return total / counts.rows, {"loss_contrastive": total / counts.rows, "matched": right / counts.rows}


OBJECTIVES = {
    "joint": joint_objective,
    "diffusion": diffusion_objective,
    "vae": vae_objective,
    "contrastive": contrastive_objective,
}
