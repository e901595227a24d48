"""The composition's own rules, and the settings of generation."""

import dataclasses

import pytest

from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig, model_config
from dreamllm_jax.config.towers import (
    ClipTextConfig,
    ClipVisionConfig,
    LlamaConfig,
    RopeScaling,
    UNetConfig,
    VaeConfig,
)


def test_what_a_model_can_do_follows_from_its_towers():
    llama, vision, drawing = LlamaConfig(), ClipVisionConfig(), dict(unet=UNetConfig(), vae=VaeConfig())
    assert not DreamLLMConfig(llama=llama).sees and not DreamLLMConfig(llama=llama).draws
    assert DreamLLMConfig(llama=llama, vision=vision).sees and DreamLLMConfig(llama=llama, **drawing).draws
    assert not DreamLLMConfig(vision=vision).sees and not DreamLLMConfig(**drawing).draws
    assert DreamLLMConfig(vision=vision).num_patches == 256 and DreamLLMConfig(llama=llama).num_patches == 0
    assert DreamLLMConfig(**drawing).latent_size == 64


def test_context_length_counts_scaled_positions():
    plain = LlamaConfig(max_position_embeddings=2048)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling("linear", 2.5))
    assert DreamLLMConfig(llama=plain).context_length == 2048
    assert DreamLLMConfig(llama=scaled).context_length == 5120


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (dict(unet=UNetConfig()), "unet and vae come together"),
        (
            dict(unet=UNetConfig(in_channels=9), vae=VaeConfig()),
            "takes 9 channels and gives 4, and the VAE's latents have 4; they must be the same .*inpainting",
        ),
        (dict(unet=UNetConfig(), vae=VaeConfig(latent_channels=16)), "latents have 16"),
        (dict(unet=UNetConfig(), vae=VaeConfig(), image_size=100), "image_size=100 is not divisible by"),
        (dict(contrastive=True), "needs both the vision and the text tower"),
        (
            dict(unet=UNetConfig(), vae=VaeConfig(), text=ClipTextConfig(hidden_size=960)),
            "text.hidden_size=960 must equal unet.cross_attention_dim=768",
        ),
    ],
)
def test_towers_that_do_not_fit_together(parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        DreamLLMConfig(**parts)


def test_from_a_recipe():
    assert model_config({"llama": {"hidden_size": 64, "num_attention_heads": 4}}).llama.head_dim == 16
    with pytest.raises(ValueError, match=r"model.unet: unknown key 'blocks'"):
        model_config({"unet": {"blocks": 3}})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
        (dict(max_images=-1), "max_images is -1"),
        (dict(num_inference_steps=0), "num_inference_steps is 0"),
        (dict(guidance_scale=0.5), "guidance_scale is 0.5; it must be at least 1"),
        (dict(guidance_rescale=1.5), "guidance_rescale is 1.5; it must lie in"),
        (dict(eta=-0.1), "eta is -0.1; it must lie in"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(top_p=0.0), "top_p 0.0"),
    ],
)
def test_settings_of_generation_out_of_range(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        GenerationConfig(**settings)
