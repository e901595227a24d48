"""The samplers. Every public function in this file is a sampler; recipes select it by the function's name.

To add a sampler, write one function, here or in a package of your own (`sampler="my_project.code:heun"`, or a
short name by an entry point; see `config.registry`):

    def heun(schedule: ScheduleConfig, num_steps: int) -> Plan

It returns the coefficients by which `num_steps` calls of the network turn noise into clean latents (see
`Plan`). A sampler with an adjustable share of fresh noise has a third parameter, `eta: float = 0.0`. For a
number of steps that it cannot take, it raises ValueError.
"""

from __future__ import annotations

import numpy as np

from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.plan import Plan, ddim_plan, interpolated_levels, training_levels
from dreamllm_jax.diffusion.schedule import alphas_cumprod, inference_timesteps


def ddpm(schedule: ScheduleConfig, num_steps: int) -> Plan:
    """DDPM's ancestral sampling (arXiv 2006.11239): DDIM with eta = 1."""
    return ddim_plan(*training_levels(schedule, num_steps), eta=1.0)


def ddim(schedule: ScheduleConfig, num_steps: int, eta: float = 0.0) -> Plan:
    """DDIM (arXiv 2010.02502)."""
    end = 1.0 if schedule.set_alpha_to_one else float(alphas_cumprod(schedule)[0])
    return ddim_plan(*training_levels(schedule, num_steps), end, eta)


def euler(schedule: ScheduleConfig, num_steps: int) -> Plan:
    """Euler's method on the probability-flow ODE in x / a (arXiv 2206.00364): DDIM on other noise levels."""
    timesteps = inference_timesteps(schedule, num_steps)
    if schedule.timestep_spacing == "linspace":  # timesteps are not rounded
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]
    plan = ddim_plan(timesteps, interpolated_levels(schedule, timesteps))
    if schedule.timestep_spacing == "leading":  # which stops short of the last training step
        return plan
    return plan._replace(initial_scale=float(np.sqrt(1 - np.float32(plan.alpha_bar[0]))))  # pure noise


def dpmpp_2m(schedule: ScheduleConfig, num_steps: int) -> Plan:
    """DPM-Solver++ 2M (arXiv 2211.01095): `euler` with x_0 extrapolated in log(a / s) from two steps."""
    if schedule.timestep_spacing == "trailing":
        timesteps = inference_timesteps(schedule, num_steps)
    else:  # the spacing counts the noise-free end as a step
        most = schedule.num_train_timesteps - 2
        if not 1 <= num_steps <= most:
            raise ValueError(f"num_steps is {num_steps}; sampler 'dpmpp_2m' allows 1 to {most}.")
        timesteps = inference_timesteps(schedule, num_steps + 1)[:-1]
    abar = interpolated_levels(schedule, timesteps)
    plan, h = ddim_plan(timesteps, abar), np.diff(np.log(np.sqrt(abar) / np.sqrt(1 - abar)))
    extrapolated = np.zeros(num_steps)  # the first and last steps are of first order
    extrapolated[1:-1] = plan.clean[1:-1] * h[1:] / (2 * h[:-1])
    return plan._replace(clean=plan.clean + extrapolated, previous_clean=-extrapolated)
