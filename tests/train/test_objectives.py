"""The joint loss depends on documents and their noise, and not on padding or other rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.base import build
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.diffusion.schedule import alphas_cumprod
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.objectives import (
    StepNoise,
    denoising_errors,
    drop_conditions,
    loss_counts,
    sample_noise,
    sample_timesteps,
)
from dreamllm_jax.train.step import row_prng_keys
from tests.train import tiny

fields = [field.name for field in dataclasses.fields(StepNoise)]


def rows_of_noise(step_noise: StepNoise, slices: list[tuple[int, int, int] | None]) -> StepNoise:
    """Returns the noise of dreams `first` to `first + n - 1` of row `b`, for every (b, first, n)."""

    def take(values):
        out = np.zeros_like(values)
        for row, part in enumerate(slices):
            if part is not None:
                b, first, n = part
                out[row, :n] = values[b, first : first + n]
        return out

    return jax.tree.map(take, step_noise)


def test_a_packed_row_equals_its_documents_one_by_one(
    documents, batch, step_noise, joint, params, packed_result, assert_same_gradients
):
    places, alone = [], []
    for b, row in enumerate(tiny.rows_of(documents)):
        first = 0
        for document in row:
            places.append((b, first, len(document.dreams)))
            alone.append([document])
            first += len(document.dreams)
    assert max(map(len, tiny.rows_of(documents))) == 3 and len(alone) == len(documents)
    assert step_noise.dropped[batch.dream_mask].any() and not step_noise.dropped[batch.dream_mask].all()
    loss, sums, grads = 0.0, dict.fromkeys(packed_result[1], 0.0), {}
    for i in range(0, len(alone), tiny.ROWS):
        lacking = tiny.ROWS - len(alone[i : i + tiny.ROWS])
        some = tiny.packed(alone[i : i + tiny.ROWS] + [[]] * lacking)
        some_noise = rows_of_noise(step_noise, places[i : i + tiny.ROWS] + [None] * lacking)
        part, metrics, some_grads = joint(params, some, some_noise, loss_counts(batch))
        loss += part
        sums = {k: v + metrics[k] for k, v in sums.items()}
        grads = {k: g + grads[k] if grads else g for k, g in some_grads.items()}
    np.testing.assert_allclose(loss, packed_result[0], rtol=1e-5)
    for name, value in packed_result[1].items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    assert_same_gradients(grads, packed_result[2])


def scrambled(x, keep, rng):
    """Returns `x` with other values of its kind where `keep` is false."""
    keep = np.broadcast_to(keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim)), x.shape)
    if x.dtype == bool:
        other = ~x
    elif np.issubdtype(x.dtype, np.integer):
        other = rng.integers(0, 256, x.shape)
    else:
        other = rng.normal(size=x.shape)
    return np.where(keep, x, other).astype(x.dtype)


def test_padding_changes_nothing(batch, step_noise, joint, params, packed_result, assert_same_gradients):
    rng, real = np.random.default_rng(1), batch.segment_ids > 0
    assert not real.all() and not batch.image_mask.all() and not batch.dream_mask.all()
    other = batch.replace(
        tokens=scrambled(batch.tokens, real, rng),
        targets=scrambled(batch.targets, batch.loss_weights > 0, rng),
        positions=scrambled(batch.positions, real, rng) % 64,
        images=scrambled(batch.images, batch.image_mask, rng),
        dream_images=scrambled(batch.dream_images, batch.dream_mask, rng),
    )
    other_noise = jax.tree.map(lambda x: scrambled(x, batch.dream_mask, rng), step_noise)
    loss, _, grads = joint(params, other, other_noise, loss_counts(batch))
    np.testing.assert_allclose(loss, packed_result[0], rtol=1e-6)
    assert_same_gradients(grads, packed_result[2])


def test_other_rows_change_nothing(documents, batch, step_noise, joint, params, assert_same_gradients):
    """A row's share of the loss is the same among other rows."""
    mine = 2
    rng, keep = np.random.default_rng(2), np.arange(tiny.ROWS) == mine

    def share(some, step_noise):
        """The other rows have no weight in the loss."""
        muted = some.replace(
            loss_weights=np.where(keep[:, None], some.loss_weights, 0),
            dream_mask=np.where(keep[:, None], some.dream_mask, False),
        )
        return joint(params, muted, step_noise, loss_counts(batch))

    loss, metrics, grads = share(batch, step_noise)
    assert metrics["loss_lm"] > 0 and metrics["loss_vm"] > 0
    others = tiny.rows_of(tiny.documents(len(documents), seed=5))
    others[mine] = tiny.rows_of(documents)[mine]
    changed = tiny.packed(others)
    np.testing.assert_array_equal(changed.tokens[mine], batch.tokens[mine])
    assert (changed.tokens != batch.tokens).any(1).sum() == tiny.ROWS - 1
    changed_noise = jax.tree.map(lambda x: scrambled(x, keep, rng), step_noise)
    loss_again, _, grads_again = share(changed, changed_noise)
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    assert_same_gradients(grads_again, grads)


def test_draws_are_a_function_of_seed_step_and_row():
    @functools.partial(jax.jit, static_argnums=(2, 3))
    def drawn(seed, step, rows, dreams):
        keys = row_prng_keys(jax.random.key(seed), step, rows)
        return sample_noise(keys, dreams, tiny.config(), tiny.stage().loss)

    step_noise = drawn(0, 5, 4, 3)
    again, more = drawn(0, 5, 4, 3), drawn(0, 5, 8, 3)
    next_step, next_seed = drawn(0, 6, 4, 3), drawn(1, 5, 4, 3)
    assert step_noise.noise.shape == (4, 3, 4, 4, 4) and step_noise.timesteps.shape == (4, 3)
    for name in fields:
        mine = np.asarray(getattr(step_noise, name))
        np.testing.assert_array_equal(mine, getattr(again, name))
        np.testing.assert_array_equal(mine, getattr(more, name)[:4])
        if name != "dropped":
            rows = mine.reshape(4, -1)
            assert len({row.tobytes() for row in rows}) == 4, name
            assert (mine != getattr(next_step, name)).any() and (mine != getattr(next_seed, name)).any(), name
    kinds = [np.asarray(getattr(step_noise, n)) for n in ("latent_noise", "noise", "perturbation")]
    assert all((a != b).all() for a, b in [kinds[:2], kinds[1:], kinds[::2]])
    assert (0 <= step_noise.timesteps).all() and (step_noise.timesteps < 1000).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_the_share_of_dropped_conditions(share):
    loss = build(LossConfig, {"condition_dropout": share})
    keys = jax.random.split(jax.random.key(0), 500)
    dropped = jax.jit(lambda k: sample_noise(k, 8, tiny.config(), loss).dropped)(keys)
    assert abs(dropped.mean() - share) < 0.02


def test_a_model_that_does_not_draw_needs_no_noise():
    assert (
        sample_noise(
            jax.random.split(jax.random.key(0), 2), 0, tiny.config(unet=None, vae=None), LossConfig()
        )
        is None
    )


def test_dropped_conditions_become_the_rows_null():
    x = jnp.arange(3 * 4).reshape(3, 4, 1, 1) * jnp.ones((2, 2))
    dropped = jnp.array([[True, False, True, False], [False, True, False, False], [True] * 4])
    null = jnp.array([3, 2, -1])
    out = np.asarray(drop_conditions(x, dropped, null))[..., 0, 0]
    np.testing.assert_array_equal(out, [[3, 1, 3, 3], [4, 6, 6, 7], [8, 9, 10, 11]])


def encode_by_hand(module, images):
    """An encoder whose mean is the image."""
    mean = images[:, ::2, ::2, :1] / 255.0 * jnp.ones(4)
    return jnp.concatenate([mean, jnp.full_like(mean, -2.0)], axis=-1)


def denoise_nothing(module, latents, timesteps, context, added=None):
    """A denoiser that returns its input."""
    return latents


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_denoising_errors_by_hand(batch, step_noise, kind, monkeypatch):
    """The target has the offset, the input the perturbation too; min-SNR weights; empty slots are 0."""
    monkeypatch.setattr(DreamLLMModule, "encode_image", encode_by_hand)
    monkeypatch.setattr(DreamLLMModule, "denoise", denoise_nothing)
    config = tiny.config(schedule=dict(prediction_type=kind))
    context = jnp.zeros((step_noise.timesteps.size, 1, 32))
    errors = denoising_errors(
        DreamLLMModule(config),
        {},
        jax.tree.map(jnp.asarray, batch),
        jax.tree.map(jnp.asarray, step_noise),
        tiny.stage().loss,
        context,
        None,
    )
    abar = alphas_cumprod(config.schedule)[step_noise.timesteps].astype(np.float64)
    signal, sigma = np.sqrt(abar)[..., None, None, None], np.sqrt(1 - abar)[..., None, None, None]
    mean = batch.dream_images[:, :, ::2, ::2, :1] / 255.0
    clean = config.vae.scaling_factor * (mean + np.exp(-1.0) * step_noise.latent_noise)
    noise = step_noise.noise + 0.1 * step_noise.offset
    noisy = signal * clean + sigma * (noise + 0.1 * step_noise.perturbation)
    target = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}[kind]
    snr = abar / (1 - abar)
    weights = np.minimum(snr, 5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    expected = ((noisy - target) ** 2).mean((2, 3, 4)) * weights * batch.dream_mask
    np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-6)


def test_counts(batch):
    counts = loss_counts(batch)
    assert counts.tokens == batch.loss_weights.sum() > 1
    assert counts.dreams == batch.dream_mask.sum() > 1
    assert counts.rows == tiny.ROWS
    nothing = batch.replace(loss_weights=0 * batch.loss_weights, dream_mask=np.zeros_like(batch.dream_mask))
    assert loss_counts(nothing).tokens == 1 and loss_counts(nothing).dreams == 1


def test_cubic_timesteps_prefer_noisy_steps():
    key = jax.random.key(0)
    uniform = sample_timesteps(key, 4000, 1000, LossConfig())
    cubic = sample_timesteps(key, 4000, 1000, LossConfig(timestep_sampling="cubic"))
    assert 480 < float(uniform.mean()) < 520
    assert 730 < float(cubic.mean()) < 770  # E[1 - u^3] = 3/4
    assert int(cubic.min()) >= 0 and int(cubic.max()) <= 999
