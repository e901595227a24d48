"""The reverse process: one loop over the table of coefficients that a sampler computes.

The next latents of each sampler (see `samplers`) are a linear combination of four terms: the current latents
x, the network's estimate of the clean latents x_0, its estimate from the previous step, and fresh noise z.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dreamllm_jax.config.registry import resolve
from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.plan import Plan
from dreamllm_jax.diffusion.schedule import row_normal, to_clean_and_noise

# (latents [B h w c], timesteps [B] float32) -> the network's prediction [B h w c]
Denoise = Callable[[Array, Array], Array]


def sample(
    denoise: Denoise,
    init_noise: Float[Array, "B h w c"],
    config: ScheduleConfig,
    *,
    sampler: str = "dpmpp_2m",
    num_steps: int = 25,
    eta: float = 0.0,
    keys: Key[Array, "B"] | None = None,
    step_noise: Float[Array, "steps B h w c"] | None = None,
) -> Float[Array, "B h w c"]:
    """Returns clean latents sampled from noise by `num_steps` calls of `denoise` in one `lax.scan`.

    Call it inside jit, with `config`, `sampler`, `num_steps` and `eta` static.

    Args:
      denoise: maps latents [B, h, w, c] and timesteps [B] to the network's prediction, of the kind
        `config.prediction_type`. Timesteps are float32, because those of Euler may be fractional. For
        classifier-free guidance, wrap the network in `guided`.
      init_noise: standard normal noise, whatever the sampler.
      sampler: a function of `samplers`, or `package.module:function`.
      eta: the share of fresh noise in DDIM, from 0 (deterministic) to 1 (as in DDPM).
      keys: one key per row for the fresh noise of DDPM, and of DDIM with eta > 0. A row's result depends
        only on its own key. Generate `init_noise` from different keys.
      step_noise: the fresh noise itself, one entry per step, instead of `keys`.

    Raises:
      ValueError: `sampler` is unknown; `num_steps` does not suit the schedule; `eta` does not suit the
        sampler; or the sampler needs noise and not exactly one of `keys` and `step_noise` was given.
    """
    plan = make_plan(config, sampler, num_steps, eta)
    stochastic = bool(plan.noise.any())
    if stochastic and (keys is None) == (step_noise is None):
        raise ValueError(f"Sampler {sampler!r} adds noise at every step; pass either keys or step_noise.")
    if stochastic and step_noise is not None and step_noise.shape != (num_steps, *init_noise.shape):
        raise ValueError(
            f"step_noise has shape {step_noise.shape}; it must be {(num_steps, *init_noise.shape)}."
        )

    def step(carry, inputs):
        latents, previous = carry
        index, columns, noise = inputs
        at: Any = Plan(*columns)
        prediction = denoise(latents, jnp.full(latents.shape[:1], at.timestep)).astype(jnp.float32)
        clean, _ = to_clean_and_noise(config.prediction_type, prediction, latents, at.alpha_bar)
        latents = at.latents * latents + at.clean * clean + at.previous_clean * previous
        if stochastic:
            if noise is None:
                assert keys is not None  # checked above
                noise = row_normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), latents.shape[1:])
            latents += at.noise * noise
        return (latents, clean), None

    latents = plan.initial_scale * init_noise.astype(jnp.float32)
    columns = [jnp.asarray(column) for column in plan[:-1]]
    inputs = (jnp.arange(num_steps), columns, step_noise if stochastic else None)
    (latents, _), _ = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), inputs)
    return latents


def guided(
    denoise: Denoise,
    guidance_scale: Float[Array, "B"] | Float[Array, ""] | float,
    guidance_rescale: Float[Array, "B"] | Float[Array, ""] | float = 0.0,
) -> Denoise:
    """Returns a denoiser with classifier-free guidance: uncond + scale (cond - uncond) (arXiv 2207.12598).

    `denoise` is called once per step on a doubled batch [2B, h, w, c]. It must condition the first half on
    the empty or negative prompt and the second half on the prompt. `guidance_rescale`, from 0 to 1, moves
    the standard deviation of each row towards that of its conditional prediction (arXiv 2305.08891,
    section 3.4). Scale and rescale may be traced and may differ per row.
    """

    def guided_denoise(latents, timesteps):
        both = denoise(jnp.concatenate([latents] * 2), jnp.concatenate([timesteps] * 2))
        uncond, cond = jnp.split(both.astype(jnp.float32), 2)
        per_row = (-1,) + (1,) * (latents.ndim - 1)
        mixed = uncond + jnp.reshape(guidance_scale, per_row) * (cond - uncond)
        axes = tuple(range(1, latents.ndim))
        ratio = cond.std(axes, keepdims=True) / jnp.maximum(mixed.std(axes, keepdims=True), 1e-12)
        return mixed * (1 + jnp.reshape(guidance_rescale, per_row) * (ratio - 1))

    return guided_denoise


def make_plan(config: ScheduleConfig, sampler: str, num_steps: int, eta: float = 0.0) -> Plan:
    """Returns the table of `sample`, as float32, from the sampler of this name (see `config.registry`).

    Example: "ddim" in 4 steps on Stable Diffusion's schedule (`ScheduleConfig()`). The first step scales the
    latents by 0.876 and adds 0.318 of the clean estimate; the last step returns the clean estimate itself.

        timestep   alpha_bar   latents   clean   previous_clean   noise
             751       0.056     0.876   0.318                0       0
             501       0.275     0.672   0.467                0       0
             251       0.672     0.072   0.940                0       0
               1       0.998     0.000   1.000                0       0

    Raises:
      ValueError: `sampler`, `num_steps` or `eta` is invalid, as in `sample`, or the sampler returned no plan.
    """
    function = resolve("sampler", sampler)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be between 0 and 1.")
    if not eta:
        plan = function(config, num_steps)
    elif "eta" in inspect.signature(function).parameters:
        plan = function(config, num_steps, eta=eta)
    else:
        raise ValueError(f"eta is {eta}, but sampler {sampler!r} has no eta; set it to 0, or use 'ddim'.")
    if not isinstance(plan, Plan):
        raise ValueError(f"sampler {sampler!r} returned {type(plan).__name__}; it must return a Plan.")
    columns = [np.asarray(column, np.float32) for column in plan[:-1]]
    for name, column in zip(Plan._fields, columns, strict=False):
        if column.shape != (num_steps,) or not np.isfinite(column).all():
            raise ValueError(
                f"sampler {sampler!r} returned {name} of shape {column.shape}; it must be {num_steps} finite "
                "numbers, one for each step."
            )
    return Plan._make([*columns, float(plan.initial_scale)])
