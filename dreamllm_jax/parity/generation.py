"""Compares two generations: greedy text after an image, and an image by guided DDPM."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.diffusion.sampling import guided, make_plan, sample
from dreamllm_jax.generate.decode import DecodeRules, decode_text, dream
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.parity.case import Case, channels_last, slots
from dreamllm_jax.parity.errors import absolute_error


def prompt_rows(sequences: list[list[int]], **fields: Any) -> Batch:
    """Returns a batch of token ids: one left-aligned prompt per row."""
    length = max(map(len, sequences))
    tokens = np.array([s + [0] * (length - len(s)) for s in sequences], np.int32)
    no_slots = np.full_like(tokens, -1)
    batch = Batch(
        tokens=tokens,
        targets=no_slots,
        segment_ids=np.array([[1] * len(s) + [0] * (length - len(s)) for s in sequences], np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        loss_weights=np.zeros(tokens.shape, np.float32),
        image_slots=no_slots,
        dream_slots=no_slots,
        image_mask=np.zeros((len(tokens), 1), bool),
        dream_mask=np.zeros((len(tokens), 1), bool),
        null_dream=np.full(len(tokens), -1, np.int32),
    )
    return jax.tree.map(jnp.asarray, dataclasses.replace(batch, **fields))


def compare_greedy(case: Case) -> dict[str, float]:
    """Counts the greedily decoded tokens after a prompt with an image that differ from the reference's."""
    prompt = case.reference["gen.prompt_ids"][0].tolist()
    wanted = case.reference["gen.greedy_ids"][0].tolist()[len(prompt) :]
    tokens, special = np.array([prompt], np.int32), case.tokenizer.special
    image = channels_last(case.reference["in.images"][0])
    batch = prompt_rows(
        [prompt],
        image_slots=slots(tokens, special.im_start, case.config.num_patches),
        images=image[None, None],
    )
    assert case.config.llama is not None
    anything = DecodeRules(
        forbidden=jnp.zeros(case.config.llama.vocab_size, bool),
        stops=jnp.zeros(0, jnp.int32),
        dream_start=jnp.int32(special.dream_start),
        may_dream=jnp.ones(1, bool),
        dream_room=jnp.int32(0),
        temperature=jnp.float32(0),
        top_p=jnp.float32(1),
    )
    number, engine = len(wanted), case.engine
    state = engine.read(batch, len(prompt) + number)
    _, written, _ = decode_text(
        engine.params,
        state,
        jnp.ones(1, bool),
        jnp.full(1, number, jnp.int32),
        jax.random.key(0)[None],
        anything,
        model=engine.module,
        max_new_tokens=number,
    )
    return {"gen.greedy_ids": float((np.asarray(written[0]) != np.array(wanted)).sum())}


def compare_image(case: Case) -> dict[str, float]:
    """Returns the errors of text to image: query states, conditions, timesteps, final latents, image."""
    reference, settings = case.reference, case.settings
    states = np.concatenate([reference["t2i.prompt_embeds"], reference["t2i.negative_embeds"][:1]])
    prompts = [*settings["prompts"], ""]
    context, _ = case.apply(jnp.asarray(states), method=DreamLLMModule.conditions)
    steps = settings["num_inference_steps"]
    timesteps = make_plan(case.config.schedule, "ddpm", steps).timestep
    both = np.concatenate([reference["t2i.negative_embeds"], reference["t2i.prompt_embeds"]])
    latents, image = _draw(case, both, steps)
    return {
        "t2i.states": float(
            np.max([_state_error(case, *pair) for pair in zip(prompts, states, strict=True)])
        ),
        "t2i.conditions": absolute_error(_conditions(case, prompts), context),
        "t2i.timesteps": absolute_error(timesteps, reference["t2i.timesteps"]),
        "t2i.final_latents": absolute_error(latents, channels_last(reference["t2i.final_latents"])),
        "t2i.image": absolute_error(image, channels_last(reference["t2i.image"])),
    }


def _conditions(case: Case, prompts: list[str]) -> np.ndarray:
    """Returns the U-Net's contexts of some prompts in one batch, through the KV cache, as in generation."""
    special, engine = case.tokenizer.special, case.engine
    sequences = [[special.bos, *case.tokenizer.encode(prompt)] for prompt in prompts]
    capacity = max(map(len, sequences)) + 1 + case.config.num_dream_queries
    state = engine.read(prompt_rows(sequences), capacity)
    active, start = jnp.ones(len(prompts), bool), jnp.int32(special.dream_start)
    return np.asarray(dream(engine.params, state, active, start, model=engine.module)[1])


def _state_error(case: Case, prompt: str, wanted: np.ndarray) -> float:
    """Returns the error of a prompt's query states, computed in one pass as in training."""
    special, queries = case.tokenizer.special, case.config.num_dream_queries
    before = [special.bos, *case.tokenizer.encode(prompt), special.dream_start]
    tokens = [*before, *[special.im_patch] * queries, special.dream_end]
    at = slots(np.array([tokens], np.int32), special.dream_start, queries)
    hidden = case.apply(prompt_rows([tokens], dream_slots=at), method=DreamLLMModule.read)
    return absolute_error(hidden[0, len(before) : len(before) + queries], wanted)


def _draw(case: Case, states: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (final latents, image before clipping) of guided DDPM from the reference's noise."""
    config, reference = case.config, case.reference
    assert config.vae is not None
    scale, factor = case.settings["guidance_scale"], config.vae.scaling_factor

    @jax.jit
    def draw(variables, states, init, step_noise):
        context, _ = case.module.apply(variables, states, method=DreamLLMModule.conditions)

        def denoise(latents, timesteps):
            return case.module.apply(
                variables, latents, timesteps, context, None, method=DreamLLMModule.denoise
            )

        process = guided(denoise, scale)
        latents = sample(
            process, init, config.schedule, sampler="ddpm", num_steps=steps, step_noise=step_noise
        )
        return latents, case.module.apply(variables, latents / factor, method=lambda m, x: m.vae.decode(x))

    init, noise = (channels_last(reference[f"t2i.{name}"]) for name in ("init_latents", "step_noise"))
    return jax.tree.map(np.asarray, draw(case.variables, states, init, noise))
