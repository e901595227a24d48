"""A model trained here and exported gives the same logits, latents and image in PyTorch."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dreamllm_jax import Document, DreamLLM
from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.convert.folders import convert_to_torch
from dreamllm_jax.data.sequences import encode_prompt
from dreamllm_jax.diffusion.sampling import guided, sample
from dreamllm_jax.diffusion.schedule import row_normal
from dreamllm_jax.generate.decode import dream
from dreamllm_jax.generate.prompts import prompt_batch
from dreamllm_jax.models.clip import normalize_pixels
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.loop import train
from tests.train import tiny

STEPS, SCALE, SEED = 4, 3.0, 5
PROMPT = "a handwritten seven"
RECIPE = dict(
    name="trained",
    model=tiny.MODEL,
    tokenizer=dict(corpus=tiny.CORPUS, vocab_size=tiny.VOCABULARY),
    frozen_dtype="float32",
    stages=[
        dict(
            name="joint",
            trainable=("llama", "vision_projector", "dream_queries", "condition_projector"),
            steps=4,
            data=dict(
                source=tiny.SOURCE,
                source_options=dict(kinds=dict(pairs=1.0)),
                batch_size=8,
                length=64,
                max_images=2,
                max_dreams=3,
            ),
            optim=dict(learning_rate=1e-2, warmup_ratio=0.0),
        )
    ],
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the model as this package loads it and as PyTorch loads it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("trained")
    model, out = train(build_recipe(RECIPE), folder / "run"), folder / "torch"
    convert_to_torch(model, out)

    def linear(file):
        state = torch.load(out / file, weights_only=True)
        weight, bias = state["projector.projector.weight"], state.get("projector.projector.bias")
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    return SimpleNamespace(
        ours=DreamLLM.from_pretrained(model),
        torch=torch,
        llama=transformers.LlamaForCausalLM.from_pretrained(out).eval(),
        clip=transformers.CLIPVisionModel.from_pretrained(out / "clip").eval(),
        unet=diffusers.UNet2DConditionModel.from_pretrained(out / "sd", subfolder="unet").eval(),
        vae=diffusers.AutoencoderKL.from_pretrained(out / "sd", subfolder="vae").eval(),
        scheduler=diffusers.DDIMScheduler.from_pretrained(out / "sd", subfolder="scheduler"),
        queries=torch.load(out / "dream_embedding.bin", weights_only=True)["dream_queries"].reshape(
            tiny.Q, -1
        ),
        see=linear("clip_vision_embedding.bin"),
        condition=linear("stable_diffusion_head.bin"),
    )


@pytest.mark.parity
def test_training_moved_it(trained):
    assert float(jnp.abs(trained.ours.params["llama"]["norm"]["scale"] - 1).max()) > 1e-3


@pytest.mark.parity
def test_logits_after_a_picture(trained):
    torch, ours = trained.torch, trained.ours
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    prompt = Document([Image.fromarray(pixels), "Which digit is this?"])
    row = encode_prompt(prompt, ours.tokenizer, ours.config.num_patches, 64)
    with torch.no_grad():
        seen = np.moveaxis(np.asarray(normalize_pixels(jnp.asarray(pixels[None]))), -1, 1).copy()
        states = trained.clip(torch.tensor(seen), output_hidden_states=True).hidden_states[-2][:, 1:]
        embeds = trained.llama.model.embed_tokens(torch.tensor(row.tokens.astype(np.int64)))
        embeds[torch.tensor(row.image_slots >= 0)] = trained.see(states)[0]
        theirs = trained.llama(inputs_embeds=embeds[None]).logits[0].numpy()
    batch = prompt_batch([prompt], ours.tokenizer, ours.config, None)
    variables, module = {"params": ours._engine.params}, ours._engine.module
    hidden = module.apply(variables, jax.tree.map(jnp.asarray, batch), method=DreamLLMModule.read)
    logits = np.asarray(module.apply(variables, hidden, method=DreamLLMModule.logits))[0, : len(row)]
    np.testing.assert_allclose(logits, theirs, atol=1e-5 * np.abs(theirs).max())


def their_context(trained, prompt):
    """Returns the U-Net's context after a prompt, computed by PyTorch."""
    torch, ours = trained.torch, trained.ours
    tokens = [*encode_prompt(prompt, ours.tokenizer, 4, 64).tokens, ours.tokenizer.special.dream_start]
    embeds = trained.llama.model.embed_tokens(torch.tensor([int(t) for t in tokens]))
    embeds = torch.cat([embeds, trained.queries])[None]
    states = trained.llama.model(inputs_embeds=embeds).last_hidden_state
    return trained.condition(states[:, -len(trained.queries) :])


def their_latents(trained, init):
    """Runs guided DDIM of diffusers from the same noise."""
    torch, scheduler = trained.torch, trained.scheduler
    with torch.no_grad():
        context = torch.cat([their_context(trained, ""), their_context(trained, PROMPT)])
        latents = torch.tensor(np.moveaxis(init, -1, 1).copy())
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            null, conditioned = trained.unet(torch.cat([latents] * 2), t, context).sample.chunk(2)
            latents = scheduler.step(null + SCALE * (conditioned - null), t, latents, eta=0.0).prev_sample
        return latents


def our_latents(trained, init):
    """Runs the same with this package."""
    ours, module = trained.ours, trained.ours._engine.module
    start, contexts = jnp.int32(ours.tokenizer.special.dream_start), []
    for prompt in ("", PROMPT):
        batch = prompt_batch([prompt], ours.tokenizer, ours.config, None)
        reading = ours._engine.read(batch, 64)
        contexts.append(dream(ours._engine.params, reading, jnp.ones(1, bool), start, model=module)[1])
    context = jnp.concatenate(contexts)

    def denoise(latents, timesteps):
        variables = {"params": ours._engine.params}
        return module.apply(variables, latents, timesteps, context, None, method=DreamLLMModule.denoise)

    process = guided(denoise, SCALE)
    return sample(process, init, ours.config.schedule, sampler="ddim", num_steps=STEPS)


@pytest.mark.parity
def test_latents_and_picture(trained):
    key = jax.random.fold_in(jax.random.key(SEED), 0)  # of the prompt's first image
    size, channels = trained.ours.config.latent_size, trained.ours.config.unet.in_channels
    init = row_normal(jax.random.fold_in(key, 0)[None], (size, size, channels))
    theirs = their_latents(trained, np.asarray(init))
    expected = np.moveaxis(theirs.numpy(), 1, -1)
    np.testing.assert_allclose(our_latents(trained, init), expected, atol=1e-4 * np.abs(expected).max())
    with trained.torch.no_grad():
        decoded = trained.vae.decode(theirs / trained.ours.config.vae.scaling_factor).sample
    wanted = np.moveaxis(decoded[0].numpy(), 0, -1).clip(-1, 1) * 127.5 + 127.5
    (picture,) = trained.ours.generate_images(
        PROMPT, seed=SEED, sampler="ddim", num_inference_steps=STEPS, guidance_scale=SCALE
    )
    assert np.asarray(picture).std() > 1 and np.abs(np.asarray(picture) - wanted).max() < 0.51
    (plain,) = trained.ours.generate_images(
        PROMPT, seed=SEED, sampler="ddim", num_inference_steps=STEPS, guidance_scale=1.0
    )
    assert dataclasses.asdict(trained.ours.config.schedule)["prediction_type"] == "v_prediction"
    assert np.any(np.asarray(plain) != np.asarray(picture))  # guidance had an effect
