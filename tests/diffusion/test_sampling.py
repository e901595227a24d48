"""Samplers compared step by step with diffusers, and with problems that have a known solution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.registry import known_names
from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.sampling import guided, make_plan, sample
from dreamllm_jax.diffusion.schedule import alphas_cumprod

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", dict(clip_sample=False)),
    "ddim": ("DDIMScheduler", dict(clip_sample=False)),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
SAMPLERS = tuple(SCHEDULERS)
MEAN, DEVIATION = 0.7, 0.3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def row_keys(seed, rows):
    return jax.random.split(jax.random.key(seed), rows)


def network(xp, latents, timesteps):
    """A nonlinear function of both arguments, for a numpy-like module `xp`."""
    return xp.tanh(0.8 * latents + 0.3) + xp.cos(0.01 * timesteps) * 0.4


def our_trajectory(config, sampler, num_steps, noise, step_noise, eta=0.0):
    """Returns the network's inputs at every step, and the result."""
    inputs = []

    def denoise(latents, timesteps):
        jax.debug.callback(
            lambda x, t: inputs.append((np.array(x), float(t))), latents, timesteps[0], ordered=True
        )
        return network(jnp, latents, timesteps.reshape(-1, 1, 1, 1))

    @jax.jit
    def run(noise, step_noise):
        options = dict(sampler=sampler, num_steps=num_steps, eta=eta, step_noise=step_noise)
        return sample(denoise, noise, config, **options)

    result = np.asarray(run(noise, step_noise))
    jax.effects_barrier()
    return inputs, result


def their_trajectory(monkeypatch, config, sampler, num_steps, noise, step_noise, eta=0.0):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    name, options = SCHEDULERS[sampler]
    fields = {**dataclasses.asdict(config), **options}
    if sampler != "ddim":
        del fields["set_alpha_to_one"]
    scheduler = getattr(diffusers, name)(**fields)
    scheduler.set_timesteps(num_steps)
    noises = iter(torch.tensor(np.asarray(step_noise)))
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *a, **k: next(noises))
    latents = torch.tensor(np.asarray(noise)) * scheduler.init_noise_sigma
    inputs = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        inputs.append((scaled.numpy(), float(t)))
        kwargs = dict(eta=eta) if sampler == "ddim" else {}
        latents = scheduler.step(network(torch, scaled, t.float()), t, latents, **kwargs).prev_sample
    return inputs, latents.numpy()


def assert_same_trajectory(monkeypatch, config, sampler, num_steps, eta=0.0, tolerance=3e-6):
    noise, step_noise = normal(0, 2, 4, 4, 3), normal(1, num_steps, 2, 4, 4, 3)
    arguments = (config, sampler, num_steps, noise, step_noise, eta)
    theirs, their_result = their_trajectory(monkeypatch, *arguments)
    ours, our_result = our_trajectory(*arguments)
    assert len(ours) == len(theirs) == num_steps
    for (our_latents, our_t), (their_latents, their_t) in zip(ours, theirs, strict=True):
        assert our_t == pytest.approx(their_t, rel=1e-6)
        scale = max(1.0, np.abs(their_latents).max())
        np.testing.assert_allclose(our_latents, their_latents, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(our_result, their_result, rtol=0, atol=tolerance * np.abs(their_result).max())


def test_every_sampler_is_compared():
    assert set(SAMPLERS) == set(known_names("sampler"))


@pytest.mark.parity
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "spacing"),
    # DDIM with linspace is left out: there diffusers steps to a level other than the one it visits next.
    sorted({(m, s) for m in SAMPLERS for s in ("leading", "trailing", "linspace")} - {("ddim", "linspace")}),
)
def test_every_step_equals_diffusers(monkeypatch, sampler, spacing, prediction):
    config = ScheduleConfig(prediction_type=prediction, timestep_spacing=spacing)
    assert_same_trajectory(monkeypatch, config, sampler, 10)


@pytest.mark.parity
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("curve", ["linear", "squaredcos_cap_v2"])
def test_other_curves_equal_diffusers(monkeypatch, sampler, curve):
    config = ScheduleConfig(beta_schedule=curve, prediction_type="v_prediction")
    assert_same_trajectory(monkeypatch, config, sampler, 20)


@pytest.mark.parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_equals_diffusers(monkeypatch, sampler, prediction):
    config = ScheduleConfig(
        prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    # The latents of diffusers' Euler are 4096 times larger here. Half a unit in the last place of float32 at
    # 4096 is 2.4e-4; how much of it an addition loses depends on the CPU.
    tolerance = 4096 * 2**-24 if sampler == "euler" else 3e-6
    assert_same_trajectory(monkeypatch, config, sampler, 5, tolerance=tolerance)


@pytest.mark.parity
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_with_noise_equals_diffusers(monkeypatch, eta, to_one):
    assert_same_trajectory(monkeypatch, ScheduleConfig(set_alpha_to_one=to_one), "ddim", 10, eta)


@pytest.mark.parity
@pytest.mark.parametrize("num_steps", [1, 2, 3, 30])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_and_uneven_steps_equal_diffusers(monkeypatch, sampler, num_steps):
    assert_same_trajectory(monkeypatch, ScheduleConfig(), sampler, num_steps)


def gaussian_denoiser(config):
    """The exact prediction for data N(MEAN, DEVIATION^2)."""
    levels = jnp.asarray(alphas_cumprod(config))

    def denoise(latents, timesteps):
        abar = jnp.interp(timesteps, jnp.arange(len(levels)), levels).reshape(-1, 1, 1, 1)
        a, variance = jnp.sqrt(abar), abar * DEVIATION**2 + 1 - abar
        clean = MEAN + a * DEVIATION**2 * (latents - a * MEAN) / variance
        noise = (latents - a * clean) / jnp.sqrt(1 - abar)
        velocity = a * noise - jnp.sqrt(1 - abar) * clean
        return {"epsilon": noise, "v_prediction": velocity, "sample": clean}[config.prediction_type]

    return denoise


def test_the_plan_in_the_docstring():
    plan = make_plan(ScheduleConfig(), "ddim", 4)
    expected = [
        (751, 0.056, 0.876, 0.318, 0, 0),
        (501, 0.275, 0.672, 0.467, 0, 0),
        (251, 0.672, 0.072, 0.940, 0, 0),
        (1, 0.998, 0, 1, 0, 0),
    ]
    np.testing.assert_allclose(np.stack(plan[:-1], axis=1), expected, atol=5e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gaussian_is_recovered(sampler, prediction):
    config = ScheduleConfig(prediction_type=prediction, timestep_spacing="trailing")

    @jax.jit
    def run(noise, keys):
        options = dict(sampler=sampler, num_steps=1000, keys=keys)
        return sample(gaussian_denoiser(config), noise, config, **options)

    abar = alphas_cumprod(config)[-1]  # not quite 0: start from the data's distribution at that level
    start = np.sqrt(abar) * MEAN + np.sqrt(abar * DEVIATION**2 + 1 - abar) * normal(0, 1, 128, 128, 1)
    result = run(start, row_keys(1, 1))
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.005)
    assert float(result.std()) == pytest.approx(DEVIATION, abs=0.01)


def test_orders_of_convergence():
    """Halving the step size halves the error. The second-order sampler is better despite its last step."""
    config = ScheduleConfig(timestep_spacing="trailing")
    noise, abar = normal(0, 1, 8, 8, 1), float(alphas_cumprod(config)[-1])
    spread = np.sqrt(abar * DEVIATION**2 + 1 - abar)
    exact = MEAN + DEVIATION * (noise - np.sqrt(abar) * MEAN) / spread

    def error(sampler, num_steps):
        result = sample(gaussian_denoiser(config), noise, config, sampler=sampler, num_steps=num_steps)
        return float(jnp.abs(result - exact).mean())

    assert 0.4 < error("ddim", 160) / error("ddim", 80) < 0.65
    assert 0.4 < error("dpmpp_2m", 160) / error("dpmpp_2m", 80) < 0.55
    assert error("dpmpp_2m", 160) < 0.6 * error("ddim", 160)


def test_euler_is_ddim_without_noise():
    """On the same noise levels, the two are one step under two names and two parametrizations."""
    config, noise = ScheduleConfig(prediction_type="v_prediction"), normal(0, 2, 4, 4, 3)
    euler, ddim = (
        sample(gaussian_denoiser(config), noise, config, sampler=sampler, num_steps=9)
        for sampler in ("euler", "ddim")
    )
    np.testing.assert_allclose(euler, ddim, atol=1e-5)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.5), ("euler", 0.0), ("dpmpp_2m", 0.0)])
def test_rows_do_not_depend_on_the_batch(sampler, eta):
    config = ScheduleConfig()
    noise, keys = normal(0, 5, 4, 4, 3), row_keys(1, 5)

    def run(noise, keys):
        def denoise(x, t):
            return network(jnp, x, t.reshape(-1, 1, 1, 1))

        return sample(denoise, noise, config, sampler=sampler, num_steps=6, eta=eta, keys=keys)

    full = run(noise, keys)
    np.testing.assert_allclose(run(noise[3:4], keys[3:4])[0], full[3], atol=1e-6)
    np.testing.assert_allclose(run(noise[::-1], keys[::-1])[::-1], full, atol=1e-6)


def test_zero_terminal_snr_is_finite_everywhere():
    for spacing in ("leading", "trailing", "linspace"):
        config = ScheduleConfig(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing
        )
        for sampler in SAMPLERS:
            for num_steps in (1, 2, 3, 50, 998):
                assert all(np.isfinite(x).all() for x in make_plan(config, sampler, num_steps))


def halves(latents, timesteps):
    """A stand-in for a conditional network: it treats the second half of the batch differently."""
    rows = latents.shape[0] // 2
    scale = jnp.where(jnp.arange(2 * rows) < rows, 0.5, 1.5).reshape(-1, 1, 1, 1)
    return scale * network(jnp, latents, timesteps.reshape(-1, 1, 1, 1))


def test_guidance_mixes_the_two_halves():
    x, t = normal(0, 2, 4, 4, 3), jnp.array([10.0, 10.0])
    raw = network(jnp, x, 10.0)
    np.testing.assert_allclose(guided(halves, 1.0)(x, t), 1.5 * raw, rtol=1e-5)
    np.testing.assert_allclose(guided(halves, 0.0)(x, t), 0.5 * raw, rtol=1e-5)
    per_row = guided(halves, jnp.array([1.0, 3.0]))(x, t)
    np.testing.assert_allclose(per_row, jnp.stack([1.5 * raw[0], 3.5 * raw[1]]), rtol=1e-5)


def test_guidance_rescale_restores_the_conditional_deviation():
    x, t = normal(0, 2, 4, 4, 3), jnp.array([10.0, 10.0])
    cond = 1.5 * network(jnp, x, 10.0)
    full, half, none = (guided(halves, 7.5, phi)(x, t) for phi in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(full.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(half, (full + none) / 2, rtol=1e-5)
    flat = guided(lambda x, t: jnp.zeros_like(x), 7.5, 0.7)(x, t)
    np.testing.assert_array_equal(flat, jnp.zeros_like(x))


def test_one_compilation_serves_all_guidance_scales():
    config, traces = ScheduleConfig(), []

    @jax.jit
    def run(noise, keys, scale, rescale):
        traces.append(1)
        return sample(guided(halves, scale, rescale), noise, config, sampler="ddpm", num_steps=4, keys=keys)

    noise, keys = normal(0, 2, 4, 4, 3), row_keys(1, 2)
    results = [run(noise, keys, scale, rescale) for scale, rescale in ((1.0, 0.0), (7.5, 0.0), (7.5, 0.7))]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1]) and not np.allclose(results[1], results[2])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(sampler="plms"),
            "Unknown sampler 'plms'; known: ddim, ddpm, dpmpp_2m, euler; for",
        ),
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=1000), "1 to 998"),
        (dict(sampler="euler", num_steps=1001), "1 to 1000"),
        (dict(sampler="ddim", eta=1.5), "eta is 1.5"),
        (dict(sampler="euler", eta=0.5), "eta is 0.5, but sampler 'euler' has no eta; set it to 0"),
        (dict(sampler="ddpm"), "pass either keys or step_noise"),
        (dict(sampler="ddpm", step_noise=jnp.zeros((3, 1, 2, 2, 1))), "step_noise has shape"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t: x, jnp.zeros((1, 2, 2, 1)), ScheduleConfig(), **options)
