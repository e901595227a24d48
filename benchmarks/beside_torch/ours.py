"""Our side: calls this package as its users do."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from benchmarks.beside_torch.inputs import FIRST_TEXT_TOKEN, SPECIAL, Inputs
from benchmarks.beside_torch.sizes import Size, Training
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import MeshConfig, Recipe, StageConfig
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.schedule import row_normal
from dreamllm_jax.generate.decode import DecodeState, decode_text
from dreamllm_jax.generate.documents import draw_and_append, image_block_length
from dreamllm_jax.generate.engine import Engine, prompt_keys
from dreamllm_jax.generate.images import draw_images
from dreamllm_jax.generate.layout import generation_layout
from dreamllm_jax.generate.prompts import cache_capacity
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.sharding import make_mesh, shard_batch
from dreamllm_jax.train.objectives import StepNoise, sample_noise
from dreamllm_jax.train.state import create_state
from dreamllm_jax.train.step import row_prng_keys, train_step


class Step:
    """The train step of a joint stage, with its state."""

    def __init__(self, inputs: Inputs, training: Training):
        size = inputs.size
        self.stage = size.stage(training)
        frozen = "float32" if size.model.dtype == "float32" else "bfloat16"
        recipe = Recipe(
            "benchmark", size.model, (self.stage,), frozen_dtype=frozen, mesh=MeshConfig(data=1, fsdp=1)
        )
        self.mesh = make_mesh(recipe.mesh, jax.devices()[:1])
        self.model = DreamLLMModule(size.model)
        trained = {path.split("/")[0] for path in self.stage.trainable}
        params = inputs.weights(lambda path: "float32" if path.split("/")[0] in trained else frozen)
        self.state = create_state(params, self.stage, recipe, self.mesh)
        self.batch = shard_batch(inputs.training_batch, self.mesh)
        self.rate = jnp.float32(self.stage.optim.learning_rate)

    def next_noise(self) -> StepNoise:
        """Returns the noise and the timesteps that the next step will sample."""
        return step_noise(self.stage, self.model.config, int(self.state.step))

    def __call__(self) -> float:
        """Runs one step and returns its loss."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = train_step(
                self.state, self.batch, self.rate, model=self.model, stage=self.stage.compile_key()
            )
            jax.block_until_ready(self.state)
        return float(metrics["loss"])


def step_noise(stage: StageConfig, model: DreamLLMConfig, step: int) -> StepNoise:
    """Returns the noise and the timesteps that a step of a stage samples, as `create_state` seeds it."""
    key = jax.random.fold_in(jax.random.key(Recipe.seed), zlib.crc32(stage.name.encode()))
    keys = row_prng_keys(key, jnp.int32(step), stage.data.batch_size)
    return jax.device_get(sample_noise(keys, 1, model, stage.loss))


class _TokenIdsOnly(Tokenizer):
    """A tokenizer without text: prompts and outputs are token ids."""

    def __init__(self, vocab_size: int):
        self.special = SPECIAL
        vars(self)["vocab_size"] = vocab_size  # instead of the cached property


class Generator:
    """Generates text, images and documents from the prompts and conditions of `inputs`."""

    def __init__(self, inputs: Inputs):
        size = inputs.size
        assert size.model.llama is not None
        self.size, self.inputs = size, inputs
        dtype = jnp.dtype(size.model.dtype)
        weights = inputs.weights(lambda _: size.model.dtype)
        params = {path: jnp.asarray(x, dtype) for path, x in weights.items()}
        del weights  # the stacked layers are freed as soon as they are taken apart
        params = unflatten_dict(generation_layout(params, size.model.llama), sep="/")
        self.engine = Engine(size.model, params, _TokenIdsOnly(size.model.llama.vocab_size))

    def read(self, rows: int, tokens_after: int) -> DecodeState:
        """Reads `rows` prompts into a cache that has capacity for `tokens_after` more tokens."""
        limit = self.size.model.context_length
        capacity = cache_capacity(self.size.prompt + tokens_after, limit)
        return jax.block_until_ready(self.engine.read(self.inputs.prompts(rows), capacity))

    def logits(self, state: DecodeState) -> np.ndarray:
        """Returns the logits of the next token, float32 [rows, V]."""
        return np.asarray(_logits(self.engine.params, state.last, model=self.engine.module))

    def write(self, state: DecodeState, rows: int) -> tuple[DecodeState, np.ndarray]:
        """Decodes `size.new_tokens` tokens in each row, greedily; no token stops a row early."""
        count = self.size.new_tokens
        state, tokens, _ = decode_text(
            self.engine.params,
            state,
            jnp.ones(rows, bool),
            jnp.full(rows, count, jnp.int32),
            prompt_keys(0, rows),
            self.engine.control([], np.zeros(rows, bool), 0, self.size.generation),
            model=self.engine.module,
            max_new_tokens=count,
        )
        return state, np.asarray(tokens)

    def draw(self, num_images: int) -> np.ndarray:
        """Generates images from the conditions of `inputs`, uint8 [num_images, h, w, 3]."""
        contexts, null = self.inputs.conditions(num_images)
        dtype = jnp.dtype(self.size.model.dtype)
        condition = (jnp.asarray(contexts, dtype), None)
        unconditional = (jnp.broadcast_to(jnp.asarray(null, dtype), contexts.shape), None)
        images = draw_images(
            self.engine.params,
            condition,
            unconditional,
            prompt_keys(0, num_images),
            self.size.generation,
            self.engine.module,
        )
        return np.asarray(images)

    def document(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Continues one prompt with text, an image and more text, which can attend to the image."""
        tokens_after = 2 * self.size.new_tokens + image_block_length(self.engine)
        state, first = self.write(self.read(1, tokens_after), 1)
        null = (jnp.asarray(self.inputs.conditions(1)[1], self.size.model.dtype), None)
        state, pictures = draw_and_append(
            self.engine, state, np.ones(1, bool), prompt_keys(0, 1), self.size.generation, null
        )
        _, second = self.write(state, 1)
        return first, pictures[0], second


@functools.partial(jax.jit, static_argnames="model")
def _logits(params: dict, states: jax.Array, *, model: DreamLLMModule) -> jax.Array:
    return model.apply({"params": params}, states[:, None], method=DreamLLMModule.logits)[:, 0]


def first_noise(size: Size, rows: int, lengths: int | None = None) -> np.ndarray:
    """Returns the initial latents of each row's image [rows, h, w, c].

    They depend on the row's PRNG key and, in a document, on the number of tokens before the image:
    `lengths`.
    """
    keys = prompt_keys(0, rows)
    fold = jax.vmap(jax.random.fold_in, (0, None))
    if lengths is not None:
        keys = fold(keys, lengths)
    assert size.model.unet is not None
    shape = (size.model.latent_size, size.model.latent_size, size.model.unet.in_channels)
    return np.asarray(row_normal(fold(keys, 0), shape))


def forbidden(size: Size) -> np.ndarray:
    """Returns the mask of tokens that are never decoded, bool [V]: all control tokens except <eos>."""
    assert size.model.llama is not None
    mask = np.arange(size.model.llama.vocab_size) < FIRST_TEXT_TOKEN
    mask[SPECIAL.eos] = False
    return mask
