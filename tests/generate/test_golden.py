"""What the reference itself generated: greedy tokens, conditions, guided DDPM steps and the picture."""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.convert.dreamllm_files import configs_from_dreamllm, read_dreamllm
from dreamllm_jax.convert.engine import to_jax
from dreamllm_jax.convert.safetensors_files import read_safetensors
from dreamllm_jax.convert.shapes import expected_shapes
from dreamllm_jax.diffusion.sampling import guided, make_plan, sample
from dreamllm_jax.generate.decode import Control, decode_text, dream, prefill
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.state import nested
from dreamllm_jax.types import Batch

BOUND = 1e-3
BOS = 1


class Case(NamedTuple):
    config: DreamLLMConfig
    params: dict[str, Any]
    reference: dict[str, np.ndarray]
    settings: dict[str, Any]
    words: sentencepiece.SentencePieceProcessor

    @property
    def module(self) -> DreamLLMModule:
        return DreamLLMModule(self.config)

    def token(self, name: str) -> int:
        return self.settings["special"]["additional_special_tokens"][name]


@pytest.fixture(scope="module", params=["dreamllm-a", "dreamllm-b"])
def case(request, golden):
    folder = golden / request.param
    config = configs_from_dreamllm(folder / "checkpoint").model
    parts, _ = read_dreamllm(folder / "checkpoint", configs_from_dreamllm(folder / "checkpoint"))
    tensors, report = to_jax(parts, expected_shapes(config))
    report.raise_if_faulty(str(folder))
    reference = read_safetensors(folder / "reference.safetensors")
    return Case(
        config,
        nested({path: jnp.asarray(tensor.read()) for path, tensor in tensors.items()}),
        {name: tensor.read() for name, tensor in reference.items()},
        json.loads((folder / "reference.json").read_text()),
        sentencepiece.SentencePieceProcessor(str(folder / "checkpoint" / "tokenizer.model")),
    )


def rows_of(sequences: list[list[int]], **pictures) -> Batch:
    """Token ids as left-aligned rows, one prompt each."""
    length = max(map(len, sequences))
    tokens = np.array([s + [0] * (length - len(s)) for s in sequences], np.int32)
    segments = np.array([[1] * len(s) + [0] * (length - len(s)) for s in sequences], np.int32)
    nowhere = np.full_like(tokens, -1)
    batch = Batch(
        tokens=tokens,
        targets=nowhere,
        segment_ids=segments,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        loss_weights=np.zeros(tokens.shape, np.float32),
        image_slots=nowhere,
        dream_slots=nowhere,
        image_mask=np.zeros((len(tokens), 1), bool),
        dream_mask=np.zeros((len(tokens), 1), bool),
        null_dream=np.full(len(tokens), -1, np.int32),
    )
    return dataclasses.replace(batch, **pictures)


def test_greedy_tokens_after_a_picture(case):
    prompt = case.reference["gen.prompt_ids"][0].tolist()
    wanted = case.reference["gen.greedy_ids"][0].tolist()
    number = len(wanted) - len(prompt)
    assert number == 12 and wanted[: len(prompt)] == prompt
    first = prompt.index(case.token("<im_start>")) + 1
    slots = np.full((1, len(prompt)), -1, np.int32)
    slots[0, first : first + case.config.num_patches] = np.arange(case.config.num_patches)
    image = case.reference["in.images"][0].transpose(1, 2, 0)
    batch = rows_of([prompt], image_slots=slots, images=image[None, None])
    assert (batch.tokens[slots >= 0] == case.token("<im_patch>")).all()
    anything = Control(
        forbidden=jnp.zeros(case.config.llama.vocab_size, bool),
        stops=jnp.zeros(0, jnp.int32),
        dream_start=jnp.int32(case.token("<dream_start>")),
        may_dream=jnp.ones(1, bool),
        dream_room=jnp.int32(0),
        temperature=jnp.float32(0),
        top_p=jnp.float32(1),
    )
    reading = prefill(case.params, batch, model=case.module, capacity=64)
    _, tokens, stop = decode_text(
        case.params,
        reading,
        jnp.ones(1, bool),
        jnp.full(1, number, jnp.int32),
        jax.random.key(0)[None],
        anything,
        model=case.module,
        max_new_tokens=number,
    )
    assert tokens[0].tolist() == wanted[len(prompt) :]
    assert stop.tolist() == [-1]


def conditions_of(case: Case, prompts: list[str]) -> np.ndarray:
    """The U-Net's contexts after some prompts, through the cache, as `generate_images` makes them."""
    sequences = [[BOS, *case.words.encode(prompt)] for prompt in prompts]
    capacity = max(map(len, sequences)) + 1 + case.config.num_dream_queries
    reading = prefill(case.params, rows_of(sequences), model=case.module, capacity=capacity)
    start = jnp.int32(case.token("<dream_start>"))
    _, context, _ = dream(case.params, reading, jnp.ones(len(prompts), bool), start, model=case.module)
    return np.asarray(context)


def test_conditions_of_prompts_and_of_the_empty_prompt(case):
    """The reference encodes each prompt alone; here they share a batch, padded to the longest."""
    prompts = [*case.settings["prompts"], ""]
    states = np.concatenate([case.reference["t2i.prompt_embeds"], case.reference["t2i.negative_embeds"][:1]])
    wanted, _ = case.module.apply({"params": case.params}, jnp.asarray(states), method="conditions")
    assert np.abs(wanted[0] - wanted[2]).max() > 100 * BOUND  # prompts differ by far more than the bound
    np.testing.assert_allclose(conditions_of(case, prompts), wanted, atol=BOUND)


def test_query_states_of_prompts(case):
    """The states themselves, before their projection: one packed reading, as in training."""
    queries = case.config.num_dream_queries
    states = [*case.reference["t2i.prompt_embeds"], case.reference["t2i.negative_embeds"][0]]
    for prompt, wanted in zip([*case.settings["prompts"], ""], states, strict=True):
        before = [BOS, *case.words.encode(prompt), case.token("<dream_start>")]
        tokens = [*before, *[case.token("<im_patch>")] * queries, case.token("<dream_end>")]
        slots = np.full((1, len(tokens)), -1, np.int32)
        slots[0, len(before) : len(before) + queries] = np.arange(queries)
        batch = jax.tree.map(jnp.asarray, rows_of([tokens], dream_slots=slots))
        hidden = case.module.apply({"params": case.params}, batch, method="read")
        np.testing.assert_allclose(hidden[0, len(before) : len(before) + queries], wanted, atol=BOUND)


def test_guided_ddpm_steps_and_the_picture(case):
    """Five steps with guidance from the reference's noise, and what the VAE makes of their end."""
    reference, steps = case.reference, case.settings["num_inference_steps"]
    np.testing.assert_array_equal(
        make_plan(case.config.schedule, "ddpm", steps).timestep, reference["t2i.timesteps"]
    )
    variables = {"params": case.params}

    @jax.jit
    def draw(states, init, step_noise):
        context, _ = case.module.apply(variables, states, method="conditions")

        def denoise(latents, timesteps):
            return case.module.apply(variables, latents, timesteps, context, None, method="denoise")

        latents = sample(
            guided(denoise, case.settings["guidance_scale"]),
            init,
            case.config.schedule,
            method="ddpm",
            num_steps=steps,
            step_noise=step_noise,
        )
        scaled = latents / case.config.vae.scaling_factor
        return latents, case.module.apply(variables, scaled, method=lambda m, x: m.vae.decode(x))

    states = np.concatenate([reference["t2i.negative_embeds"], reference["t2i.prompt_embeds"]])
    init = reference["t2i.init_latents"].transpose(0, 2, 3, 1)
    latents, picture = draw(states, init, reference["t2i.step_noise"].transpose(0, 1, 3, 4, 2))
    np.testing.assert_allclose(latents, reference["t2i.final_latents"].transpose(0, 2, 3, 1), atol=BOUND)
    np.testing.assert_allclose(picture, reference["t2i.image"].transpose(0, 2, 3, 1), atol=BOUND)
