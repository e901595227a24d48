"""`DreamLLM`: what users call. It reads and writes documents in which text and images interleave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dreamllm_jax.batch import Batch
from dreamllm_jax.checkpoint.model_folder import check_complete, save_pretrained
from dreamllm_jax.checkpoint.storage import flatten, to_device, unflatten
from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.convert.opening import open_model
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.sampling import make_plan
from dreamllm_jax.distributed import to_host
from dreamllm_jax.generate.decode import decode_text, dream
from dreamllm_jax.generate.documents import write_documents
from dreamllm_jax.generate.engine import Engine, prompt_keys
from dreamllm_jax.generate.images import Condition, NullCondition, draw_rows
from dreamllm_jax.generate.prompts import (
    Prompt,
    as_list,
    bucket,
    longest_prompt,
    prompt_batch,
)
from dreamllm_jax.sharding import parameter_shardings


def _on_mesh(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose programs are made for the model's mesh: activations lie on it as in training."""

    @functools.wraps(call)
    def on_mesh(self: DreamLLM, *args: Any, **options: Any) -> Any:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return call(self, *args, **options)

    return on_mesh


class DreamLLM:
    """A DreamLLM with its weights.

    A prompt is a string or a `Document`; a list of prompts is a batch, generated together, and
    gives a list of results. The same seed gives the same result: prompt i of a batch with seed s
    gets what it would get alone with seed s + i (or give one seed per prompt). Settings that a
    call leaves out are those of `generation`.

    Of several processes with one mesh over their devices, all make the same calls, and get the same results.
    """

    def __init__(
        self,
        config: DreamLLMConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        generation: GenerationConfig | None = None,
        mesh: Mesh | None = None,
        replicated: Sequence[str] = (),
    ):
        """Places the parameters (flat or nested) on the default device, or sharded over `mesh`.

        Parts of the model named in `replicated` ("unet", "vae", "vision", ...) are not sharded along the
        mesh's axis fsdp: every device of that axis holds them in full, as `mesh.replicated` of a recipe does
        for training. That takes more memory and needs no gathering. Parameters may be tensors that are not
        read yet; each host then reads what its own devices need, one tensor at a time.

        Raises:
          ValueError: a model without language model, or with fewer embeddings than the tokenizer has tokens;
            `replicated` names a part that the model has not.
        """
        _check_language(config, tokenizer)
        flat = flatten(params)
        parts = sorted({path.split("/")[0] for path in flat})
        if absent := sorted(set(replicated) - set(parts)):
            raise ValueError(f"replicated names {', '.join(absent)}; choose among {', '.join(parts)}.")
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = (
            dict.fromkeys(flat, alone) if mesh is None else parameter_shardings(flat, mesh, replicated)
        )
        placed = {k: to_device(v, shardings[k]) for k, v in flat.items()}
        self._mesh = mesh
        self._engine = Engine(config, unflatten(placed), tokenizer)
        self.generation = GenerationConfig() if generation is None else generation
        self._null_conditions: dict[bytes, NullCondition] = {}  # by the tokens of the negative prompt

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        replicated: Sequence[str] = (),
    ) -> DreamLLM:
        """Loads a folder that `save_pretrained` or a training run wrote, or a checkpoint in PyTorch's form.

        Such a checkpoint (DreamLLM, LLaMA or Vicuna, LLaVA-1.5; a folder or an id on the hub) is converted in
        passing. Control tokens that its tokenizer lacks are added, with rows for them.
        `dtype` ("float32", "bfloat16") casts the weights and sets the compute dtype; `mesh` and `replicated`
        are as in the constructor.

        Raises:
          ValueError: the folder is missing, foreign, incomplete or damaged, or another dtype.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; it must be 'float32' or 'bfloat16'.")
        loaded = open_model(path, dtype)
        check_complete(path, loaded.config, loaded.params)
        config = loaded.config if dtype is None else dataclasses.replace(loaded.config, dtype=dtype)
        return cls(config, loaded.params, loaded.tokenizer, loaded.generation, mesh, replicated)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the folder that `from_pretrained` loads, whole or not at all."""
        save_pretrained(path, flatten(self.params), self.config, self.tokenizer, self.generation)

    @property
    def config(self) -> DreamLLMConfig:
        return self._engine.config

    @property
    def params(self) -> dict[str, Any]:
        """The nested parameter tree, on the devices."""
        return self._engine.params

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @_on_mesh
    def generate_text(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """The text that continues a prompt, up to `</s>`: str, or a list of them for a list.

        Temperature 0 takes the likeliest token each time.

        Raises:
          ValueError: a prompt, or prompt and `max_new_tokens` together, beyond the model's context.
        """
        prompts, many = as_list(prompt)
        settings = self._settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        keys, engine = prompt_keys(seed, len(prompts)), self._engine
        batch = prompt_batch(prompts, self.tokenizer, self.config, settings.template)
        longest = longest_prompt(batch)
        self._check_room(longest, settings)
        capacity = bucket(longest + settings.max_new_tokens, self.config.context_length)
        _, tokens, _ = decode_text(
            engine.params,
            engine.read(batch, capacity),
            jnp.ones(len(prompts), bool),
            jnp.full(len(prompts), settings.max_new_tokens, jnp.int32),
            keys,
            engine.control([self.tokenizer.special.eos], np.zeros(len(prompts), bool), 0, settings),
            model=engine.module,
            max_new_tokens=settings.max_new_tokens,
        )
        texts = [self.tokenizer.decode(row[row >= 0].tolist()).strip() for row in to_host(tokens)]
        return texts if many else texts[0]

    @_on_mesh
    def generate_images(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        negative_prompt: str | None = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Pictures of a prompt: a list of PIL images, or a list of such lists for a list of prompts.

        `sampler` is one of ddpm, ddim, euler, dpmpp_2m; guidance is towards the prompt and away from
        `negative_prompt` (by default the empty one).

        Raises:
          ValueError: a model without image decoder, a prompt beyond the context, an unknown sampler.
        """
        prompts, many = as_list(prompt)
        if not self.config.draws:
            raise ValueError("This model has no image decoder; load one with a U-Net and a VAE to draw.")
        n = num_images_per_prompt
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
            raise ValueError(f"num_images_per_prompt is {n!r}; it must be a whole number, at least 1.")
        settings = self._settings(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
        )
        self._check_drawing(settings)
        keys = prompt_keys(seed, len(prompts))
        batch = self._drawing_batch(prompts, settings.template)
        negative = self._negative_batch(negative_prompt, settings)
        condition, null = self._condition(batch), self._null_condition(negative, settings)
        numbers = jnp.arange(n)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        image_keys = fold(keys, numbers).reshape(-1)
        rows = np.repeat(np.arange(len(prompts)), n)
        images = draw_rows(self._engine, condition, rows, image_keys, settings, null)
        pictures = [Image.fromarray(i) for i in images]
        lists = [pictures[i * n : (i + 1) * n] for i in range(len(prompts))]
        return lists if many else lists[0]

    @_on_mesh
    def generate_document(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        max_images: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        negative_prompt: str | None = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """The document that continues a prompt: a `Document`, or a list of them for a list.

        The model decides when to draw, draws, sees its own drawing, and writes on, until it ends the
        document or has no room left (`finish_reason`). `max_new_tokens` bounds the text, `max_images` the
        pictures.

        Raises:
          ValueError: a prompt beyond the context, an unknown sampler.
        """
        prompts, many = as_list(prompt)
        settings = self._settings(
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            temperature=temperature,
            top_p=top_p,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
        )
        self._check_drawing(settings)
        keys = prompt_keys(seed, len(prompts))
        batch = prompt_batch(prompts, self.tokenizer, self.config, settings.template)
        null = None
        if self.config.draws:
            null = self._null_condition(self._negative_batch(negative_prompt, settings), settings)
        documents = write_documents(self._engine, batch, keys, settings, null)
        return documents if many else documents[0]

    def _settings(self, **given: Any) -> GenerationConfig:
        """The settings of a call. Raises ValueError for one of a wrong type or value."""
        changes = {k: v for k, v in given.items() if v is not None}
        return build(GenerationConfig, to_dict(self.generation) | changes)

    def _check_drawing(self, settings: GenerationConfig) -> None:
        """Raises ValueError for an unknown sampler, or steps or an eta that it does not take."""
        if self.config.draws:
            make_plan(self.config.schedule, settings.sampler, settings.num_inference_steps, settings.eta)

    def _check_room(self, longest: int, settings: GenerationConfig) -> None:
        if longest + settings.max_new_tokens > self.config.context_length:
            raise ValueError(
                f"The longest prompt has {longest} tokens, and max_new_tokens is {settings.max_new_tokens}; "
                f"together they exceed the model's context of {self.config.context_length}: shorten one of "
                "them."
            )

    def _drawing_batch(self, prompts: list[Prompt], template: str | None) -> Batch:
        """The rows of some prompts, each with room for a picture at its end.

        Raises:
          ValueError: a prompt that is too long for that, or cannot be read.
        """
        batch = prompt_batch(prompts, self.tokenizer, self.config, template)
        longest, dream_tokens = longest_prompt(batch), self.config.num_dream_queries + 1
        if longest + dream_tokens > self.config.context_length:
            raise ValueError(
                f"The longest prompt has {longest} tokens; with {dream_tokens} for the dream it exceeds the "
                f"model's context of {self.config.context_length}: shorten it."
            )
        return batch

    def _condition(self, batch: Batch) -> Condition:
        """The U-Net's conditions of some prompts, each asked for a picture at its end."""
        needed = longest_prompt(batch) + 1 + self.config.num_dream_queries
        start = jnp.int32(self.tokenizer.special.dream_start)
        state = self._engine.read(batch, bucket(needed, self.config.context_length))
        active = jnp.ones(batch.tokens.shape[0], bool)
        _, context, pooled = dream(self.params, state, active, start, model=self._engine.module)
        return context, pooled

    def _negative_batch(self, negative_prompt: str | None, settings: GenerationConfig) -> Batch:
        """The one row of the negative prompt; None is the empty one, which has no template."""
        if not isinstance(negative_prompt, str | None):
            raise ValueError(
                f"negative_prompt is a {type(negative_prompt).__name__}; give one string, which serves all "
                "prompts."
            )
        return self._drawing_batch([negative_prompt or ""], settings.template if negative_prompt else None)

    def _null_condition(self, negative: Batch, settings: GenerationConfig) -> NullCondition | None:
        """The unconditional side of guidance, kept between calls."""
        if settings.guidance_scale == 1:
            return None
        place = negative.tokens.tobytes()
        if place not in self._null_conditions:
            self._null_conditions[place] = self._condition(negative)
        return self._null_conditions[place]


def _check_language(config: DreamLLMConfig, tokenizer: Tokenizer) -> None:
    if config.llama is None:
        raise ValueError("This model has no language model (model.llama is absent); DreamLLM needs one.")
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model embeds "
            f"{config.llama.vocab_size}; they are not of the same model."
        )
