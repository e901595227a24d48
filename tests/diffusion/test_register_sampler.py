"""A sampler from outside the package: one function in a user's own module, by import or by entry point."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.towers import ScheduleConfig
from dreamllm_jax.diffusion.sampling import make_plan, sample

# Euler on the noise levels of arXiv 2206.00364, eq. 5, as diffusers has it.
KARRAS = '''
import numpy as np

from dreamllm_jax.diffusion.plan import Plan, ddim_plan, interpolated_levels


def karras(schedule, num_steps: int, rho: float = 7.0) -> Plan:
    """Euler's method, with most of its steps at low noise."""
    steps = np.arange(schedule.num_train_timesteps)
    abar = interpolated_levels(schedule, steps)
    sigma = np.sqrt((1 - abar) / abar)
    ramp = np.linspace(sigma[-1] ** (1 / rho), sigma[0] ** (1 / rho), num_steps) ** rho
    timesteps = np.interp(np.log(ramp), np.log(sigma), steps)
    plan = ddim_plan(timesteps, 1 / (1 + ramp**2))
    return plan._replace(initial_scale=float(np.sqrt(1 - plan.alpha_bar[0])))


def wrong_type(schedule, num_steps):
    return None


def wrong_length(schedule, num_steps):
    return karras(schedule, num_steps + 1)


def not_finite(schedule, num_steps):
    plan = karras(schedule, num_steps)
    return plan._replace(noise=plan.noise + np.nan)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's module `their_samplers`, in a package that is installed under the short name `karras`."""
    (tmp_path / "their_samplers.py").write_text(KARRAS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dreamllm_jax.samplers]\nkarras = their_samplers:karras\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_samplers", None)


def network(latents, timesteps):
    return jnp.tanh(0.8 * latents + 0.3) + jnp.cos(0.01 * timesteps.reshape(-1, 1, 1, 1)) * 0.4


def draw(sampler, noise, num_steps=10):
    schedule = ScheduleConfig(timestep_spacing="linspace")
    return jax.jit(lambda x: sample(network, x, schedule, sampler=sampler, num_steps=num_steps))(noise)


@pytest.mark.parametrize("name", ["their_samplers:karras", "karras"])
def test_it_samples_under_its_name(project, name):
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    result = draw(name, noise)
    assert np.isfinite(result).all() and not np.allclose(result, draw("euler", noise), atol=1e-3)


@pytest.mark.parity
def test_it_equals_that_of_diffusers(project):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(10)
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    latents = torch.tensor(np.asarray(noise)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        predicted = torch.tanh(0.8 * scaled + 0.3) + torch.cos(0.01 * t.float()) * 0.4
        latents = scheduler.step(predicted, t, latents).prev_sample
    error = np.abs(draw("karras", noise) - latents.numpy()).max()
    assert error < 1e-4 * np.abs(latents.numpy()).max()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("karas", "Unknown sampler 'karas'; known: karras; for one of your own, write package.module:attrib"),
        ("their_samplers", "Unknown sampler 'their_samplers'"),
        ("their samplers:karras", "is not an importable name"),
    ],
)
def test_an_unknown_name_is_refused(project, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(ScheduleConfig(), name, 10)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("euler_a", {}, "the module 'their_samplers' has no 'euler_a'"),
        ("karras", dict(eta=0.5), "eta is 0.5, but sampler 'their_samplers:karras' has no eta"),
        ("wrong_type", {}, "sampler 'their_samplers:wrong_type' returned NoneType; it must return a Plan"),
        ("wrong_length", {}, r"returned timestep of shape \(11,\); it must be 10 finite numbers"),
        ("not_finite", {}, "returned noise of shape .*; it must be 10 finite numbers"),
    ],
)
def test_what_is_wrong_with_it_is_named_before_compilation(project, name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(ScheduleConfig(), f"their_samplers:{name}", 10, **options)
