"""One training step of the reference implementation, number by number: losses, outputs, every gradient."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import LossConfig
from dreamllm_jax.convert.dreamllm_files import configs_from_dreamllm, read_dreamllm
from dreamllm_jax.convert.engine import to_jax
from dreamllm_jax.convert.safetensors_files import read_safetensors
from dreamllm_jax.convert.shapes import expected_shapes
from dreamllm_jax.models.dreamllm import DreamLLMModule, query_states
from dreamllm_jax.train.objectives import Draws, count, joint
from dreamllm_jax.train.state import nested
from dreamllm_jax.types import Batch

IM_START, DREAM_START = 513, 515  # ids of the golden tokenizer
IGNORED = -100
TRAINED = ("llama", "vision_projector", "dream_queries", "condition_projector")
# Where the reference's whole model keeps the parts that receive gradients.
GRADIENTS = {
    "model.clip_vision_embedding.projector.": "vision_projector",
    "model.dream_embedding.": "dream_queries",
    "stable_diffusion_head.projector.": "condition_projector",
    "": "llama",
}


class Case(NamedTuple):
    config: DreamLLMConfig
    loss: LossConfig
    params: dict
    reference: dict


@pytest.fixture(scope="module", params=["dreamllm-a", "dreamllm-b"])
def case(request, golden):
    folder = golden / request.param
    settings = configs_from_dreamllm(folder / "checkpoint")
    parts, _ = read_dreamllm(folder / "checkpoint", settings)
    tensors, report = to_jax(parts, expected_shapes(settings.model))
    report.raise_if_faulty(str(folder))
    params = {path: tensor.read() for path, tensor in tensors.items()}
    return Case(settings.model, settings.loss, params, read_safetensors(folder / "reference.safetensors"))


def slots(tokens: np.ndarray, start: int, number: int) -> np.ndarray:
    """-1, or k * number + i at the i-th place after the row's k-th token `start`."""
    found = np.full_like(tokens, -1)
    for row, line in zip(found, tokens, strict=True):
        for k, at in enumerate(np.flatnonzero(line == start)):
            row[at + 1 : at + 1 + number] = k * number + np.arange(number)
    return found


def spread(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Things in reading order [M, ...] at the places of `mask` [B, J]; zeros elsewhere."""
    out = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    out[mask] = values
    return out


def channels_last(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 2, 3, 1)


def golden_batch(case: Case) -> Batch:
    """The reference's batch; its pictures are normalized floats."""
    reference, (p, q) = case.reference, (case.config.num_patches, case.config.num_dream_queries)
    tokens = reference["in.input_ids"].read().astype(np.int32)
    seen = reference["in.attention_mask"].read().astype(np.int32)
    labels = reference["in.labels"].read().astype(np.int32)
    targets = np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORED, np.int32)], 1)
    image_slots, dream_slots = slots(tokens, IM_START, p), slots(tokens, DREAM_START, q)
    images, dreams = (slot.max(1) // n + 1 for slot, n in ((image_slots, p), (dream_slots, q)))
    image_mask = np.arange(images.max()) < images[:, None]
    dream_mask = np.arange(dreams.max()) < dreams[:, None]
    return Batch(
        tokens=tokens,
        targets=np.maximum(targets, 0),
        segment_ids=seen,
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        loss_weights=(targets != IGNORED).astype(np.float32),
        image_slots=image_slots,
        dream_slots=dream_slots,
        image_mask=image_mask,
        dream_mask=dream_mask,
        null_dream=np.full(len(tokens), -1, np.int32),
        images=spread(channels_last(reference["in.images"].read()), image_mask),
        dream_images=spread(channels_last(reference["in.images_dm"].read()), dream_mask),
    )


def golden_draws(case: Case, mask: np.ndarray) -> Draws:
    """The reference's draws; the VAE's noise is what makes its latents of its moments."""
    arrays = {k: t.read() for k, t in case.reference.items() if k.startswith(("rand.", "out.vae"))}
    latents = arrays["rand.latents"] / case.config.vae.scaling_factor
    latent_noise = (latents - arrays["out.vae_mean"]) * np.exp(-0.5 * arrays["out.vae_logvar"])
    noise = spread(channels_last(arrays["rand.noise"]), mask)
    return Draws(
        latent_noise=spread(channels_last(latent_noise), mask),
        noise=noise,
        offset=np.zeros((*mask.shape, 1, 1, noise.shape[-1]), np.float32),
        perturbation=np.zeros_like(noise),
        timesteps=spread(arrays["rand.timesteps"].astype(np.int32), mask),
        dropped=np.zeros_like(mask),
    )


@pytest.fixture(scope="module")
def step(case):
    """(loss, metrics, gradients, outputs) of the reference's step, in one compiled function."""
    model, queries = DreamLLMModule(case.config), case.config.num_dream_queries
    example = golden_batch(case)
    images, dreams = np.nonzero(example.image_mask), np.nonzero(example.dream_mask)

    def loss(trained, frozen, batch, draws):
        return joint(model, nested({**frozen, **trained}), batch, draws, case.loss, count(batch))

    @jax.jit
    def run(trained, frozen, batch, draws, noisy):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, draws)
        variables = {"params": nested({**frozen, **trained})}
        hidden = model.apply(variables, batch, method="read")
        states = query_states(hidden, batch.dream_slots, batch.dream_mask.shape[1], queries)[dreams]
        context, _ = model.apply(variables, states, method="conditions")
        t = draws.timesteps[dreams]
        outputs = {
            "image_features": model.apply(variables, batch.images, method="see")[images],
            "last_hidden_state": hidden,
            "logits": model.apply(variables, hidden, method="logits"),
            "unet_ctx": context,
            "unet_out": model.apply(variables, noisy, t, context, None, method="denoise"),
        }
        return value, metrics, grads, outputs

    trained = {k: v for k, v in case.params.items() if k.split("/")[0] in TRAINED}
    frozen = {k: v for k, v in case.params.items() if k not in trained}
    noisy = channels_last(case.reference["out.unet_in"].read())
    return jax.tree.map(
        np.asarray, run(trained, frozen, example, golden_draws(case, example.dream_mask), noisy)
    )


def test_losses(case, step):
    loss, metrics, *_ = step
    np.testing.assert_allclose(metrics["loss_lm"], case.reference["out.lm_loss"].read(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_vm"], case.reference["out.vm_loss"].read(), rtol=1e-5)
    np.testing.assert_allclose(loss, case.reference["out.loss"].read(), rtol=1e-5)


@pytest.mark.parametrize("name", ["image_features", "last_hidden_state", "logits", "unet_ctx", "unet_out"])
def test_outputs(case, step, name):
    ours, theirs = step[3][name], case.reference[f"out.{name}"].read()
    if name in ("last_hidden_state", "logits"):
        seen = case.reference["in.attention_mask"].read() == 1
        ours, theirs = ours[seen], theirs[seen]
    if name == "unet_out":
        theirs = channels_last(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_every_gradient(case, step):
    grads, parts, found = step[2], {}, 0
    for name, tensor in case.reference.items():
        if name.startswith("grad."):
            inner, found = name.removeprefix("grad."), found + 1
            prefix = next(prefix for prefix in GRADIENTS if inner.startswith(prefix))
            parts.setdefault(GRADIENTS[prefix], {})[inner.removeprefix(prefix)] = tensor
    expected, report = to_jax(parts, {path: grad.shape for path, grad in grads.items()})
    report.raise_if_faulty("the reference's gradients")
    assert not report.ignored and found >= 25
    for path, theirs in expected.items():
        theirs = theirs.read()
        error = np.linalg.norm(grads[path] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, f"{path}: {error}"
