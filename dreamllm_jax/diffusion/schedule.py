"""The forward process: noise levels, training targets and loss weights.

The process preserves variance, as in DDPM (arXiv 2006.11239). With abar the cumulative product of 1 - beta,

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        snr_t = abar_t / (1 - abar_t)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0        (arXiv 2202.00512)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dreamllm_jax.config.towers import ScheduleConfig


class Schedule(NamedTuple):
    """The noise levels of training. It is a pytree, so jitted functions may take it or close over it."""

    alphas_cumprod: Float[Array, "T"]


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Returns the schedule that `config` describes, in float32, with the values of diffusers' schedulers."""
    return Schedule(jnp.asarray(alphas_cumprod(config)))


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """Returns abar as float32 [T], decreasing. With `rescale_betas_zero_snr` the last entry is exactly 0.

    Betas are computed in float32 and multiplied in float64. These are the noise levels on which published
    checkpoints were trained.
    """
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        betas = np.linspace(start, end, steps, dtype=np.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float32) ** 2
    else:  # squaredcos_cap_v2, arXiv 2102.09672
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999).astype(np.float32)
    abar = np.cumprod(1 - betas, dtype=np.float64)
    if config.rescale_betas_zero_snr:  # arXiv 2305.08891, algorithm 1: shift and scale sqrt(abar)
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar.astype(np.float32)


def inference_timesteps(config: ScheduleConfig, num_steps: int) -> np.ndarray:
    """Returns the training steps that a sampler visits, as int32 [num_steps], decreasing.

    The spacings are those of table 2 in arXiv 2305.08891; "leading" adds `steps_offset`. Example: 4 steps
    out of 1000, with `steps_offset=1`.

        leading    751  501  251    1
        trailing   999  749  499  249
        linspace   999  666  333    0

    Raises:
      ValueError: `num_steps` is less than 1 or more than the schedule has, or the first step lies beyond
        the end of the schedule.
    """
    total = config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps is {num_steps}; the schedule allows 1 to {total}.")
    if config.timestep_spacing == "leading":
        steps = np.arange(num_steps)[::-1] * (total // num_steps) + config.steps_offset
    elif config.timestep_spacing == "trailing":
        steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
    else:
        steps = np.round(np.linspace(0, total - 1, num_steps))[::-1]
    if steps[0] >= total:
        raise ValueError(
            f"num_steps={num_steps} with leading spacing and steps_offset={config.steps_offset} starts at "
            f"timestep {steps[0]}; the last is {total - 1}. Use fewer steps or timestep_spacing='trailing'."
        )
    return steps.astype(np.int32)


def add_noise(
    schedule: Schedule,
    clean: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    t: Int[Array, "B"],
) -> Float[Array, "B h w c"]:
    """Returns x_t: `clean` latents with noise added to the level of each row's step `t`."""
    signal, sigma = _levels(schedule.alphas_cumprod[t], clean)
    return signal * clean + sigma * noise


def prediction_target(
    schedule: Schedule,
    config: ScheduleConfig,
    clean: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    t: Int[Array, "B"],
) -> Float[Array, "B h w c"]:
    """Returns the training target at step `t`: the noise, the velocity or the clean latents."""
    if config.prediction_type == "epsilon":
        return noise
    if config.prediction_type == "sample":
        return clean
    signal, sigma = _levels(schedule.alphas_cumprod[t], clean)
    return signal * noise - sigma * clean


def to_clean_and_noise(
    prediction_type: str,
    prediction: Float[Array, "B h w c"],
    noisy: Float[Array, "B h w c"],
    alpha_bar: Float[Array, "B"] | Float[Array, ""],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """Returns the (x_0, eps) that a prediction at noise level `alpha_bar` implies.

    This is the inverse of `prediction_target`.

    Raises:
      ValueError: `prediction_type` is unknown.
    """
    signal, sigma = _levels(alpha_bar, noisy)
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (noisy - signal * prediction) / sigma
    if prediction_type == "v_prediction":
        return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy
    raise ValueError(
        f"prediction_type is {prediction_type!r}; it must be 'epsilon', 'v_prediction' or 'sample'."
    )


def snr(schedule: Schedule, t: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns the signal-to-noise ratio abar / (1 - abar) of each row's step."""
    abar = schedule.alphas_cumprod[t]
    return abar / (1 - abar)


def loss_weights(
    schedule: Schedule, config: ScheduleConfig, t: Int[Array, "B"], snr_gamma: float | None = None
) -> Float[Array, "B"]:
    """Returns min-SNR weights of the squared error (arXiv 2303.09556), or ones if `snr_gamma` is None.

    For every prediction type they amount to the weight min(snr, gamma) on the squared error of x_0.
    """
    ratio = snr(schedule, t)
    if snr_gamma is None:
        return jnp.ones_like(ratio)
    if config.prediction_type == "epsilon":
        return jnp.minimum(1, snr_gamma / ratio)
    if config.prediction_type == "v_prediction":
        return jnp.minimum(ratio, snr_gamma) / (ratio + 1)
    return jnp.minimum(ratio, snr_gamma)


def row_normal(keys: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Returns standard normal noise [B, *shape]. Row b depends on keys[b] only, not on other rows."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _levels(alpha_bar: Array, like: Array) -> tuple[Array, Array]:
    """Returns sqrt(abar) and sqrt(1 - abar), shaped to broadcast over the rows of `like`."""
    abar = alpha_bar.reshape(alpha_bar.shape + (1,) * (like.ndim - 1))
    return jnp.sqrt(abar), jnp.sqrt(1 - abar)
