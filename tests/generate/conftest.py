"""One tiny model with random weights for all tests of generation: compiling costs more than running."""

import dataclasses

import jax
import numpy as np
import pytest

from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.config.towers import (
    ClipVisionConfig,
    LlamaConfig,
    ProjectorConfig,
    ScheduleConfig,
    UNetConfig,
    VaeConfig,
)
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.generate.api import DreamLLM
from dreamllm_jax.models.parameters import abstract_params
from examples.handwriting.words import corpus_text

VOCABULARY = 512
CONFIG = DreamLLMConfig(
    llama=LlamaConfig(VOCABULARY, 32, 64, 2, 4, 2, max_position_embeddings=96),
    vision=ClipVisionConfig(16, 32, 2, 2, image_size=16, patch_size=8, projection_dim=8),
    vision_projector=ProjectorConfig(),
    num_dream_queries=3,
    condition_projector=ProjectorConfig(bias=False),
    unet=UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    ),
    vae=VaeConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=4, sample_size=8),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    image_size=8,
)
GENERATION = GenerationConfig(
    max_new_tokens=8, max_images=2, num_inference_steps=2, guidance_scale=2.0, sampler="ddim"
)


def random_params(config, seed=0):
    """Returns weights such that every bias and norm matters, without compiling an initializer."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        noise = rng.normal(size=like.shape)
        if path.endswith("kernel"):
            return (noise / (like.size / like.shape[-1] / max(1, _layers(path, like))) ** 0.5).astype(
                np.float32
            )
        return (noise * 0.3 + path.endswith("scale")).astype(np.float32)

    return {path: leaf(path, like) for path, like in abstract_params(config).items()}


def _layers(path, like):
    return like.shape[0] if "layers/" in path or "transformer_blocks/" in path else 1


def lean_towards(params, biases):
    """Adds a constant to the logits of some tokens, by a coordinate that is large in every embedding."""
    params = {path: np.array(value) for path, value in params.items()}
    params["llama/embed_tokens/embedding"][:, 0] = 4.0
    for token, bias in biases.items():
        params["llama/lm_head/kernel"][0, token] = bias
    return params


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(corpus_text(), VOCABULARY)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Returns a model that writes random text and sometimes an image of noise."""
    special = tokenizer.special
    params = lean_towards(random_params(CONFIG), {special.dream_start: 1.6, special.eos: 1.0})
    return DreamLLM(CONFIG, params, tokenizer, GENERATION)


@pytest.fixture(scope="session")
def variant(model):
    """Returns a model with a changed config, and with the weights of `model` where their shapes fit."""

    def make(params=None, generation=GENERATION, **config):
        config = dataclasses.replace(CONFIG, **config)
        known = flat(model.params)
        fresh = {k: known[k] if k in known else v for k, v in random_params(config).items()}
        return DreamLLM(config, fresh | (params or {}), model.tokenizer, generation)

    return make


@pytest.fixture(scope="session")
def flatten_params():
    return flat


def flat(tree):
    """Returns nested parameters as {path: numpy array}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture
def picture():
    """Returns a random PIL image."""
    from PIL import Image

    def make(seed, size=20):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))

    return make
