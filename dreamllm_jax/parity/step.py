"""Compares one training step: losses, outputs of every tower, and every gradient."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dreamllm_jax.batch import Batch
from dreamllm_jax.checkpoint.tensors import ArrayTensor, Tensor
from dreamllm_jax.convert.mapping import to_jax
from dreamllm_jax.models.dreamllm import DreamLLMModule, query_states
from dreamllm_jax.parity.case import IGNORED_LABEL, Case, channels_last, slots, spread
from dreamllm_jax.parity.errors import absolute_error, relative_distance
from dreamllm_jax.train.objectives import StepNoise, joint_objective, loss_counts

TRAINED = ("llama", "vision_projector", "dream_queries", "condition_projector")
# Prefixes in the reference's complete model of the parts that receive gradients.
GRADIENTS = {
    "model.clip_vision_embedding.projector.": "vision_projector",
    "model.dream_embedding.": "dream_queries",
    "stable_diffusion_head.projector.": "condition_projector",
    "": "llama",
}


def step_batch(case: Case) -> Batch:
    """Returns the reference's batch; its images are normalized floats."""
    reference, (p, q) = case.reference, (case.config.num_patches, case.config.num_dream_queries)
    special = case.tokenizer.special
    tokens = reference["in.input_ids"].astype(np.int32)
    labels = reference["in.labels"].astype(np.int32)
    targets = np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORED_LABEL, np.int32)], 1)
    image_slots, dream_slots = slots(tokens, special.im_start, p), slots(tokens, special.dream_start, q)
    images, dreams = (slot.max(1) // n + 1 for slot, n in ((image_slots, p), (dream_slots, q)))
    image_mask = np.arange(images.max()) < images[:, None]
    dream_mask = np.arange(dreams.max()) < dreams[:, None]
    return Batch(
        tokens=tokens,
        targets=np.maximum(targets, 0),
        segment_ids=reference["in.attention_mask"].astype(np.int32),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        loss_weights=(targets != IGNORED_LABEL).astype(np.float32),
        image_slots=image_slots,
        dream_slots=dream_slots,
        image_mask=image_mask,
        dream_mask=dream_mask,
        null_dream=np.full(len(tokens), -1, np.int32),
        images=spread(channels_last(reference["in.images"]), image_mask),
        dream_images=spread(channels_last(reference["in.images_dm"]), dream_mask),
    )


def step_noise_of(case: Case, mask: np.ndarray) -> StepNoise:
    """Returns the noise of the reference's step. The VAE's is recovered from its latents and moments."""
    reference = case.reference
    assert case.config.vae is not None
    latents = reference["rand.latents"] / case.config.vae.scaling_factor
    latent_noise = (latents - reference["out.vae_mean"]) * np.exp(-0.5 * reference["out.vae_logvar"])
    noise = spread(channels_last(reference["rand.noise"]), mask)
    return StepNoise(
        latent_noise=spread(channels_last(latent_noise), mask),
        noise=noise,
        offset=np.zeros((*mask.shape, 1, 1, noise.shape[-1]), np.float32),
        perturbation=np.zeros_like(noise),
        timesteps=spread(reference["rand.timesteps"].astype(np.int32), mask),
        dropped=np.zeros_like(mask),
    )


def compare_step(case: Case) -> dict[str, float]:
    """Returns the errors of losses, outputs and every gradient of the reference's training step."""
    batch = step_batch(case)
    value, metrics, grads, outputs = run_step(case, batch, step_noise_of(case, batch.dream_mask))
    reference = case.reference
    losses = {"loss": value, "loss.lm": metrics["loss_lm"], "loss.vm": metrics["loss_vm"]}
    names = {"loss": "out.loss", "loss.lm": "out.lm_loss", "loss.vm": "out.vm_loss"}
    errors = {n: float(abs(v / reference[names[n]] - 1)) for n, v in losses.items() if names[n] in reference}
    seen = reference["in.attention_mask"] == 1
    for name, ours in outputs.items():
        if f"out.{name}" not in reference:
            continue
        theirs = reference[f"out.{name}"]
        if name in ("last_hidden_state", "logits"):
            ours, theirs = ours[seen], theirs[seen]
        elif name in ("unet_out", "vae_mean", "vae_logvar"):
            theirs = channels_last(theirs)
        errors[f"out.{name}"] = absolute_error(ours, theirs)
    return errors | gradient_errors(case, grads)


def run_step(case: Case, batch: Batch, step_noise: StepNoise) -> tuple:
    """Returns (loss, metrics, gradients, outputs) of one training step, in one compiled function."""
    model, queries = case.module, case.config.num_dream_queries
    images, dreams = np.nonzero(batch.image_mask), np.nonzero(batch.dream_mask)

    def loss(trained, frozen, batch, step_noise):
        params = unflatten_dict({**frozen, **trained}, sep="/")
        return joint_objective(model, params, batch, step_noise, case.loss, loss_counts(batch))

    @jax.jit
    def run(trained, frozen, batch, step_noise, noisy):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, step_noise)
        variables = {"params": unflatten_dict({**frozen, **trained}, sep="/")}
        hidden = model.apply(variables, batch, method=DreamLLMModule.read)
        states = query_states(hidden, batch.dream_slots, batch.dream_mask.shape[1], queries)[dreams]
        context, _ = model.apply(variables, states, method=DreamLLMModule.conditions)
        moments = model.apply(variables, batch.dream_images[dreams], method=DreamLLMModule.encode_image)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        outputs = {
            "image_features": model.apply(variables, batch.images, method=DreamLLMModule.see)[images],
            "last_hidden_state": hidden,
            "logits": model.apply(variables, hidden, method=DreamLLMModule.logits),
            "unet_ctx": context,
            "unet_out": model.apply(
                variables, noisy, step_noise.timesteps[dreams], context, None, method=DreamLLMModule.denoise
            ),
            "vae_mean": mean,
            "vae_logvar": logvar,
        }
        return value, metrics, grads, outputs

    trained = {k: v for k, v in case.params.items() if k.split("/")[0] in TRAINED}
    frozen = {k: v for k, v in case.params.items() if k not in trained}
    noisy = channels_last(case.reference["out.unet_in"])
    return jax.tree.map(np.asarray, run(trained, frozen, batch, step_noise, noisy))


def gradient_errors(case: Case, grads: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the relative error of every gradient that the reference has, and warns of those that it lacks.

    Raises:
      ValueError: a gradient belongs to no parameter, has another shape, or covers only some layers.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in case.reference.items():
        if name.startswith("grad."):
            inner = name.removeprefix("grad.")
            prefix = next(prefix for prefix in GRADIENTS if inner.startswith(prefix))
            parts.setdefault(GRADIENTS[prefix], {})[inner.removeprefix(prefix)] = ArrayTensor(name, value)
    expected, report = to_jax(parts, {path: grad.shape for path, grad in grads.items()})
    absent = [line for line in report.missing if ", layer " not in line]
    report.missing = [line for line in report.missing if line not in absent]
    report.raise_if_faulty("the reference's gradients")
    if absent:
        warnings.warn(f"The reference has no gradient of {', '.join(absent)}; not compared.", stacklevel=2)
    return {
        f"grad.{path}": relative_distance(grads[path], tensor.read()) for path, tensor in expected.items()
    }
