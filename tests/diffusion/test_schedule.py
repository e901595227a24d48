"""The forward process compared with diffusers, with golden data, and with its own algebra."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion import schedule as sch

PREDICTIONS = ("epsilon", "v_prediction", "sample")
CURVES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def reference(folder):
    settings = json.loads((folder / "reference.json").read_text())
    scheduler = json.loads((folder / "parts/sd/scheduler/scheduler_config.json").read_text())
    arrays = load_file(folder / "reference.safetensors")
    arrays = {k: np.moveaxis(v, 1, -1) if v.ndim == 4 else v for k, v in arrays.items()}
    return settings, ScheduleConfig.from_hf(scheduler), arrays


@pytest.mark.parity
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_noise_levels_equal_diffusers(curve, zero_snr):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    options = dict(beta_schedule=curve, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr)
    theirs = diffusers.DDPMScheduler(**options).alphas_cumprod.numpy()
    ours = sch.alphas_cumprod(ScheduleConfig(prediction_type="v_prediction", **options))
    np.testing.assert_allclose(ours, theirs, atol=1e-6 if zero_snr else 1e-7)
    assert (np.diff(ours) < 0).all()
    assert not zero_snr or ours[-1] == 0


@pytest.mark.parity
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_equal_diffusers(spacing):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = ScheduleConfig(timestep_spacing=spacing)
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, steps_offset=config.steps_offset)
    for num_steps in (*range(1, 120, 7), 150, 250, 333, 500, 997):
        scheduler.set_timesteps(num_steps)
        # In diffusers, rounding sometimes adds a step to "trailing"; ours always has `num_steps`.
        np.testing.assert_array_equal(
            sch.inference_timesteps(config, num_steps), scheduler.timesteps.numpy()[:num_steps]
        )


@pytest.mark.parity
def test_noising_and_velocity_equal_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = ScheduleConfig(prediction_type="v_prediction")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    clean, noise, t = normal(0, 4, 3, 3, 2), normal(1, 4, 3, 3, 2), jnp.array([0, 10, 500, 999])
    theirs = [torch.tensor(np.asarray(x)) for x in (clean, noise, t)]
    schedule = sch.make_schedule(config)
    np.testing.assert_allclose(
        sch.add_noise(schedule, clean, noise, t), scheduler.add_noise(*theirs), atol=1e-6
    )
    np.testing.assert_allclose(
        sch.prediction_target(schedule, config, clean, noise, t), scheduler.get_velocity(*theirs), atol=1e-6
    )


@pytest.mark.parametrize("name", ["dreamllm-a", "dreamllm-b"])
def test_golden_noising_loss_and_timesteps(golden, name):
    settings, config, arrays = reference(golden / name)
    schedule = sch.make_schedule(config)
    clean, noise = jnp.asarray(arrays["rand.latents"]), jnp.asarray(arrays["rand.noise"])
    t = jnp.asarray(arrays["rand.timesteps"], jnp.int32)
    np.testing.assert_allclose(sch.add_noise(schedule, clean, noise, t), arrays["out.unet_in"], atol=1e-6)

    target = sch.prediction_target(schedule, config, clean, noise, t)
    errors = jnp.mean((arrays["out.unet_out"] - target) ** 2, axis=(1, 2, 3))
    weights = sch.loss_weights(schedule, config, t, settings["snr_gamma"])
    np.testing.assert_allclose(jnp.mean(weights * errors), arrays["out.vm_loss"], rtol=1e-6)
    timesteps = sch.inference_timesteps(config, settings["num_inference_steps"])
    np.testing.assert_array_equal(timesteps, arrays["t2i.timesteps"])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prediction_gives_back_clean_and_noise(prediction):
    config = ScheduleConfig(prediction_type=prediction)
    schedule = sch.make_schedule(config)
    clean, noise, t = normal(0, 3, 4, 4, 2), normal(1, 3, 4, 4, 2), jnp.array([1, 400, 999])
    noisy = sch.add_noise(schedule, clean, noise, t)
    target = sch.prediction_target(schedule, config, clean, noise, t)
    got = sch.to_clean_and_noise(prediction, target, noisy, schedule.alphas_cumprod[t])
    np.testing.assert_allclose(got[0], clean, atol=2e-5)
    np.testing.assert_allclose(got[1], noise, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_mean_the_same_for_every_prediction(prediction):
    """An error in x_0 has the weight min(snr, gamma), whatever the network predicts."""
    config = ScheduleConfig(prediction_type=prediction)
    schedule = sch.make_schedule(config)
    t = jnp.array([0, 50, 300, 999])
    noisy, clean, other = (normal(seed, 4, 2, 2, 3) for seed in range(3))
    levels = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noises = [(noisy - jnp.sqrt(levels) * x) / jnp.sqrt(1 - levels) for x in (clean, other)]
    targets = [
        sch.prediction_target(schedule, config, x, n, t) for x, n in zip((clean, other), noises, strict=True)
    ]
    error = jnp.sum((targets[0] - targets[1]) ** 2, axis=(1, 2, 3))
    expected = jnp.minimum(sch.snr(schedule, t), 5.0) * jnp.sum((clean - other) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(sch.loss_weights(schedule, config, t, 5.0) * error, expected, rtol=1e-4)
    np.testing.assert_array_equal(sch.loss_weights(schedule, config, t), jnp.ones(4))


def test_zero_terminal_snr_keeps_weights_finite():
    config = ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule = sch.make_schedule(config)
    weights = sch.loss_weights(schedule, config, jnp.array([0, 999]), 5.0)
    assert np.isfinite(weights).all() and weights[1] == 0


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        sch.inference_timesteps(ScheduleConfig(), num_steps)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("leading", (751, 501, 251, 1)), ("trailing", (999, 749, 499, 249)), ("linspace", (999, 666, 333, 0))],
)
def test_the_timesteps_in_the_docstring(spacing, expected):
    config = ScheduleConfig(timestep_spacing=spacing, steps_offset=1)
    assert tuple(sch.inference_timesteps(config, 4)) == expected


def test_leading_steps_past_the_end_are_refused():
    with pytest.raises(ValueError, match="starts at timestep 1000"):
        sch.inference_timesteps(ScheduleConfig(steps_offset=1), 1000)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'flow'"):
        x = jnp.zeros((1, 1, 1, 1))
        sch.to_clean_and_noise("flow", x, x, jnp.array(0.5))
