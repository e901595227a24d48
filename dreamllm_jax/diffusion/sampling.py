"""The reverse process: DDPM, DDIM, Euler and DPM-Solver++ 2M as one loop over one table of coefficients.

The next latents of each sampler are a linear combination of four terms: the current latents x, the network's
estimate of the clean latents x_0, its estimate from the previous step, and fresh noise z. With
a = sqrt(abar), s = sqrt(1 - abar), and a prime for the next noise level, DDIM (arXiv 2010.02502, eq. 12) is

    x' = k x + (a' - k a) x_0 + f z,     f = eta (s'/s) sqrt(1 - abar/abar'),     k = sqrt(s'^2 - f^2) / s

The others are variants of it:

    ddpm      eta = 1 (arXiv 2006.11239)
    euler     eta = 0 with noise levels of its own: Euler's step on the probability-flow ODE in x / a
              (arXiv 2206.00364)
    dpmpp_2m  like euler, with x_0 extrapolated linearly in log(a / s) from two steps (arXiv 2211.01095)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.schedule import (
    alphas_cumprod,
    inference_timesteps,
    row_normal,
    to_clean_and_noise,
)

METHODS = ("ddpm", "ddim", "euler", "dpmpp_2m")

# (latents [B h w c], timesteps [B] float32) -> the network's prediction [B h w c]
Denoise = Callable[[Array, Array], Array]


class Plan(NamedTuple):
    """A sampler's table: float32 columns of length `num_steps`, one row per step.

    `timestep` and `alpha_bar` (abar) describe the noise level at which the network is evaluated. The other
    columns are the coefficients of the next latents:

        next = latents * x + clean * x_0 + previous_clean * (x_0 of the previous step) + noise * z
    """

    timestep: np.ndarray
    alpha_bar: np.ndarray
    latents: np.ndarray
    clean: np.ndarray
    previous_clean: np.ndarray
    noise: np.ndarray


def sample(
    denoise: Denoise,
    init_noise: Float[Array, "B h w c"],
    config: ScheduleConfig,
    *,
    method: str = "dpmpp_2m",
    num_steps: int = 25,
    eta: float = 0.0,
    keys: Key[Array, "B"] | None = None,
    step_noise: Float[Array, "steps B h w c"] | None = None,
) -> Float[Array, "B h w c"]:
    """Returns clean latents sampled from noise by `num_steps` calls of `denoise` in one `lax.scan`.

    Call it inside jit, with `config`, `method`, `num_steps` and `eta` static.

    Args:
      denoise: maps latents [B, h, w, c] and timesteps [B] to the network's prediction, of the kind
        `config.prediction_type`. Timesteps are float32, because those of Euler may be fractional. For
        classifier-free guidance, wrap the network in `guided`.
      init_noise: standard normal noise, whatever the method.
      method: one of METHODS.
      eta: the share of fresh noise in DDIM, from 0 (deterministic) to 1 (as in DDPM).
      keys: one key per row for the fresh noise of DDPM, and of DDIM with eta > 0. A row's result depends
        only on its own key. Generate `init_noise` from different keys.
      step_noise: the fresh noise itself, one entry per step, instead of `keys`.

    Raises:
      ValueError: `method` is unknown; `num_steps` does not suit the schedule; `eta` does not suit the
        method; or the method needs noise and not exactly one of `keys` and `step_noise` was given.
    """
    plan = make_plan(config, method, num_steps, eta)
    stochastic = bool(plan.noise.any())
    if stochastic and (keys is None) == (step_noise is None):
        raise ValueError(f"Method {method!r} adds noise at every step; pass either keys or step_noise.")
    if stochastic and step_noise is not None and step_noise.shape != (num_steps, *init_noise.shape):
        raise ValueError(
            f"step_noise has shape {step_noise.shape}; it must be {(num_steps, *init_noise.shape)}."
        )

    def step(carry, inputs):
        latents, previous = carry
        index, at, noise = inputs
        prediction = denoise(latents, jnp.full(latents.shape[:1], at.timestep)).astype(jnp.float32)
        clean, _ = to_clean_and_noise(config.prediction_type, prediction, latents, at.alpha_bar)
        latents = at.latents * latents + at.clean * clean + at.previous_clean * previous
        if stochastic:
            if noise is None:
                noise = row_normal(jax.vmap(jax.random.fold_in, (0, None))(keys, index), latents.shape[1:])
            latents += at.noise * noise
        return (latents, clean), None

    latents = _initial_scale(config, method, plan) * init_noise.astype(jnp.float32)
    inputs = (jnp.arange(num_steps), Plan(*map(jnp.asarray, plan)), step_noise if stochastic else None)
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


def make_plan(config: ScheduleConfig, method: str, num_steps: int, eta: float = 0.0) -> Plan:
    """Returns the table of `sample`: the equations in the module's docstring, evaluated in float64.

    Example: DDIM in 4 steps on Stable Diffusion's schedule (`ScheduleConfig()`). The first step scales the
    latents by 0.876 and adds 0.318 of the clean estimate; the last step returns the clean estimate itself.

        timestep   alpha_bar   latents   clean   previous_clean   noise
             751       0.056     0.876   0.318                0       0
             501       0.275     0.672   0.467                0       0
             251       0.672     0.072   0.940                0       0
               1       0.998     0.000   1.000                0       0

    Raises:
      ValueError: `method`, `num_steps` or `eta` is invalid, as in `sample`.
    """
    if method not in METHODS:
        raise ValueError(f"Sampling method {method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if not 0 <= eta <= 1 or (eta and method != "ddim"):
        raise ValueError(
            f"eta is {eta} for method {method!r}; it must be between 0 and 1, and 0 except for 'ddim'."
        )
    timesteps, abar = _noise_levels(config, method, num_steps)
    eta = 1.0 if method == "ddpm" else eta
    at_end = 1.0 if method != "ddim" or config.set_alpha_to_one else alphas_cumprod(config)[0]
    next_abar = np.append(abar[1:], at_end)  # the level visited next, even where the spacing is uneven
    a, s, next_a, next_s = np.sqrt(abar), np.sqrt(1 - abar), np.sqrt(next_abar), np.sqrt(1 - next_abar)

    noise = eta * next_s / s * np.sqrt(1 - abar / next_abar)
    latents = np.sqrt(np.maximum(next_s**2 - noise**2, 0)) / s
    clean = next_a - latents * a
    extrapolated = np.zeros_like(clean)
    if method == "dpmpp_2m":  # the first and last steps are of first order
        h = np.diff(np.log(a / s))
        extrapolated[1:-1] = clean[1:-1] * h[1:] / (2 * h[:-1])
    columns = (timesteps, abar, latents, clean + extrapolated, -extrapolated, noise)
    return Plan(*(column.astype(np.float32) for column in columns))


def _noise_levels(config: ScheduleConfig, method: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the timestep and abar of every step in float64, with each method's conventions in diffusers."""
    total = config.num_train_timesteps
    extra_step = method == "dpmpp_2m" and config.timestep_spacing != "trailing"
    if extra_step and num_steps >= total - 1:
        raise ValueError(f"num_steps is {num_steps}; method 'dpmpp_2m' allows 1 to {total - 2}.")
    timesteps = inference_timesteps(config, num_steps)
    abar = alphas_cumprod(config).astype(np.float64)
    if method in ("ddpm", "ddim"):
        return timesteps, abar[timesteps]
    if extra_step:  # the spacing counts the noise-free end as a step
        timesteps = inference_timesteps(config, num_steps + 1)[:-1]
    elif method == "euler" and config.timestep_spacing == "linspace":  # timesteps are not rounded
        timesteps = np.linspace(0, total - 1, num_steps)[::-1]
    abar = np.maximum(abar, 2.0**-24)  # keeps sigma and its logarithm finite at zero terminal SNR
    sigma = np.interp(timesteps, np.arange(total), np.sqrt((1 - abar) / abar))
    return timesteps, 1 / (1 + sigma**2)


def _initial_scale(config: ScheduleConfig, method: str, plan: Plan) -> float:
    """Returns the factor of the initial noise: Euler treats its first latents as pure noise.

    With "leading" spacing, which stops short of the last training step, its factor is 1 as elsewhere.
    """
    pure = method == "euler" and config.timestep_spacing != "leading"
    return float(np.sqrt(1 - plan.alpha_bar[0])) if pure else 1.0
