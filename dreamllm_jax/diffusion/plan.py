"""Defines `Plan`, the coefficient table that a sampler returns, and helpers that compute it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.schedule import alphas_cumprod, inference_timesteps


class Plan(NamedTuple):
    """A sampler's table: float columns of length `num_steps`, one row per step.

    `timestep` and `alpha_bar` (abar) describe the noise level at which the network is evaluated. The other
    columns are the coefficients of the next latents:

        next = latents * x + clean * x_0 + previous_clean * (x_0 of the previous step) + noise * z

    The first latents are `initial_scale` times standard normal noise. At every step latents are scaled as in
    training, x = sqrt(abar) x_0 + sqrt(1 - abar) z. A method that is written for x / sqrt(abar), as the Euler
    classes of diffusers are, has to be converted. A step may use the clean estimate of one earlier step;
    methods that need more of them (UniPC, PNDM) cannot be written as a plan.
    """

    timestep: np.ndarray
    alpha_bar: np.ndarray
    latents: np.ndarray
    clean: np.ndarray
    previous_clean: np.ndarray
    noise: np.ndarray
    initial_scale: float = 1.0


def ddim_plan(timesteps: np.ndarray, abar: np.ndarray, end: float = 1.0, eta: float = 0.0) -> Plan:
    """Returns the plan of DDIM (arXiv 2010.02502, eq. 12) through any noise levels, in float64.

    With a = sqrt(abar), s = sqrt(1 - abar), and a prime for the next noise level,

        x' = k x + (a' - k a) x_0 + f z,     f = eta (s'/s) sqrt(1 - abar/abar'),     k = sqrt(s'^2 - f^2) / s

    Args:
      timesteps: [num_steps], may be fractional.
      abar: [num_steps], the noise levels there.
      end: abar of the result, 1 for no noise at all.
      eta: the share of fresh noise, from 0 to 1.
    """
    next_abar = np.append(abar[1:], end)  # the level visited next, even where the spacing is uneven
    a, s, next_a, next_s = np.sqrt(abar), np.sqrt(1 - abar), np.sqrt(next_abar), np.sqrt(1 - next_abar)
    noise = eta * next_s / s * np.sqrt(1 - abar / next_abar)
    latents = np.sqrt(np.maximum(next_s**2 - noise**2, 0)) / s
    return Plan(timesteps, abar, latents, next_a - latents * a, np.zeros_like(a), noise)


def training_levels(schedule: ScheduleConfig, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the timesteps of the schedule's spacing, and abar of those training steps in float64."""
    timesteps = inference_timesteps(schedule, num_steps)
    return timesteps, alphas_cumprod(schedule).astype(np.float64)[timesteps]


def interpolated_levels(schedule: ScheduleConfig, timesteps: np.ndarray) -> np.ndarray:
    """Returns abar in float64 at timesteps that may be fractional: s / a is interpolated linearly."""
    # The bound keeps s / a and its logarithm finite at zero terminal SNR.
    abar = np.maximum(alphas_cumprod(schedule).astype(np.float64), 2.0**-24)
    sigma = np.interp(timesteps, np.arange(schedule.num_train_timesteps), np.sqrt((1 - abar) / abar))
    return 1 / (1 + sigma**2)
