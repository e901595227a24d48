"""`DreamLLM`, the class that users call: it reads and writes documents of interleaved text and images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from PIL import Image

from dreamllm_jax.checkpoint.model_folder import check_complete, save_pretrained
from dreamllm_jax.checkpoint.parameter_files import as_tensors, to_device
from dreamllm_jax.config.base import build, to_dict
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.convert.opening import open_model
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.distributed import is_multi_process, to_host
from dreamllm_jax.document import Document
from dreamllm_jax.generate.conditions import Conditions
from dreamllm_jax.generate.decode import decode_text
from dreamllm_jax.generate.documents import write_documents
from dreamllm_jax.generate.engine import Engine, prompt_keys
from dreamllm_jax.generate.images import draw_in_batches
from dreamllm_jax.generate.int8 import round_to_int8
from dreamllm_jax.generate.layout import checkpoint_layout, generation_layout
from dreamllm_jax.generate.prompts import (
    Prompt,
    as_list,
    cache_capacity,
    end_tokens,
    longest_prompt,
    prompt_batch,
)
from dreamllm_jax.generate.settings import DocumentSettings, ImageSettings, Seed, TextSettings
from dreamllm_jax.sharding import parameter_shardings

P = ParamSpec("P")
R = TypeVar("R")


def _on_mesh(
    method: Callable[Concatenate[DreamLLM, P], R],
) -> Callable[Concatenate[DreamLLM, P], R]:
    """Runs a method with the model's mesh set, so that activations are sharded as in training."""

    @functools.wraps(method)
    def on_mesh(self: DreamLLM, /, *args: P.args, **options: P.kwargs) -> R:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return method(self, *args, **options)

    return on_mesh


class DreamLLM:
    """A DreamLLM with its weights.

    A prompt is a string or a `Document`. A list of prompts is one batch: its members are generated together,
    and the result is a list. The same seed gives the same result. Prompt i of a batch with seed s gets what
    it would get alone with seed s + i; a list of seeds gives each prompt its own. A setting that a call
    leaves out is taken from `generation`.

    With several processes and one mesh over all their devices, every process makes the same calls and gets
    the same results.
    """

    def __init__(
        self,
        config: DreamLLMConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        generation: GenerationConfig | None = None,
        mesh: Mesh | None = None,
        replicated: Sequence[str] = (),
        quantize: str | None = None,
    ):
        """Puts the parameters (flat or nested) on the default device, or shards them over `mesh`.

        Parts of the model named in `replicated` ("unet", "vae", "vision", ...) are not sharded along the
        mesh's axis fsdp: every device of that axis holds them in full, as with `mesh.replicated` of a recipe.
        That takes more memory and needs no gathering. Parameters may be tensors that are not read yet; each
        host then reads what its own devices need, one tensor at a time. `quantize="int8"` rounds the language
        model's kernels (see `int8`); such a model generates, but cannot be saved.

        Raises:
          ValueError: the model has no language model, it embeds fewer tokens than the tokenizer has,
            `replicated` names a part that it does not have, or `quantize` is unknown.
        """
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize is {quantize!r}; it must be 'int8' or None.")
        _check_language_model(config, tokenizer)
        assert config.llama is not None
        flat = generation_layout(flatten_dict(dict(params), sep="/"), config.llama)
        flat = flat if quantize is None else round_to_int8(flat)
        parts = sorted({path.split("/")[0] for path in flat})
        if absent := sorted(set(replicated) - set(parts)):
            raise ValueError(f"replicated names {', '.join(absent)}; choose among {', '.join(parts)}.")
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(flat, default)
        if mesh is not None:
            shardings = parameter_shardings(flat, mesh, replicated)
        on_device = {path: to_device(value, shardings[path]) for path, value in flat.items()}
        self._mesh, self._quantize = mesh, quantize
        self._engine = Engine(config, unflatten_dict(on_device, sep="/"), tokenizer)
        self._conditions = Conditions(self._engine)
        self.generation = GenerationConfig() if generation is None else generation

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        replicated: Sequence[str] = (),
        quantize: str | None = None,
    ) -> DreamLLM:
        """Loads a saved model, the model of a training run, or a checkpoint in PyTorch's formats.

        A PyTorch checkpoint (DreamLLM, LLaMA or Vicuna, LLaVA-1.5) may be a folder or the id of a model on
        the Hugging Face hub. It is converted while it is read. Control tokens that its tokenizer lacks are
        added, and the embedding tables grow by as many rows.

        Args:
          dtype: "float32" or "bfloat16"; casts the weights and sets the compute dtype. Default: as saved.
          mesh, replicated, quantize: as in the constructor.

        Raises:
          ValueError: the folder is missing, of an unknown kind, incomplete or damaged; an unknown dtype or
            `quantize`.
        """
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; it must be 'float32' or 'bfloat16'.")
        loaded = open_model(path, dtype)
        check_complete(path, loaded.config, loaded.params)
        config = loaded.config if dtype is None else dataclasses.replace(loaded.config, dtype=dtype)
        return cls(config, loaded.params, loaded.tokenizer, loaded.generation, mesh, replicated, quantize)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the folder that `from_pretrained` loads. The folder appears complete or not at all.

        Raises:
          ValueError: the model's weights are rounded, or the folder cannot take it.
        """
        self._check_not_rounded()
        assert self.config.llama is not None
        params = flatten_dict(self._engine.params, sep="/")
        if not is_multi_process():  # several processes gather arrays; one reads tensors, and copies nothing
            params = as_tensors(params)
        params = checkpoint_layout(params, self.config.llama)
        save_pretrained(path, params, self.config, self.tokenizer, self.generation)

    @property
    def config(self) -> DreamLLMConfig:
        """The model's config."""
        return self._engine.config

    @property
    def params(self) -> dict[str, Any]:
        """The nested parameter tree on the devices, as checkpoints have it: layers stacked on axis 0.

        The model itself holds the layers one by one. Every access stacks them: a second copy of the language
        model.

        Raises:
          ValueError: the model's weights are rounded.
        """
        self._check_not_rounded()
        assert self.config.llama is not None
        flat = checkpoint_layout(flatten_dict(self._engine.params, sep="/"), self.config.llama)
        return unflatten_dict(flat, sep="/")

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @overload
    def generate_text(self, prompt: Prompt, **settings: Unpack[TextSettings]) -> str: ...
    @overload
    def generate_text(self, prompt: Sequence[Prompt], **settings: Unpack[TextSettings]) -> list[str]: ...
    @_on_mesh
    def generate_text(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: Seed = 0,
    ) -> str | list[str]:
        """Returns the text that continues a prompt, up to `</s>`; a list for a list of prompts.

        Temperature 0 decodes greedily.

        Raises:
          ValueError: a prompt together with `max_new_tokens` exceeds the model's context.
        """
        prompts, is_list = as_list(prompt)
        settings = self._settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        keys, engine = prompt_keys(seed, len(prompts)), self._engine
        batch = prompt_batch(prompts, self.tokenizer, self.config, settings.template)
        longest = longest_prompt(batch)
        _check_length(longest, settings.max_new_tokens, self.config.context_length)
        ends = end_tokens(self.tokenizer, settings.template)
        capacity = cache_capacity(longest + settings.max_new_tokens, self.config.context_length)
        _, tokens, _ = decode_text(
            engine.params,
            engine.read(batch, capacity),
            jnp.ones(len(prompts), bool),
            jnp.full(len(prompts), settings.max_new_tokens, jnp.int32),
            keys,
            engine.control(ends, np.zeros(len(prompts), bool), 0, settings),
            model=engine.module,
            max_new_tokens=settings.max_new_tokens,
        )
        texts = [self.tokenizer.decode(row[row >= 0].tolist()).strip() for row in to_host(tokens)]
        return texts if is_list else texts[0]

    @overload
    def generate_images(self, prompt: Prompt, **settings: Unpack[ImageSettings]) -> list[Image.Image]: ...
    @overload
    def generate_images(
        self, prompt: Sequence[Prompt], **settings: Unpack[ImageSettings]
    ) -> list[list[Image.Image]]: ...
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
        seed: Seed = 0,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Returns a list of PIL images for a prompt, or a list of such lists for a list of prompts.

        `sampler` names a function of `diffusion.samplers`, or one of your own (see `config.registry`).
        Guidance moves towards the prompt and away from `negative_prompt`, which is empty by default.

        Raises:
          ValueError: the model has no image decoder, a prompt exceeds the context, or the sampler is unknown.
        """
        prompts, is_list = as_list(prompt)
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
        self._conditions.check_sampler(settings)
        keys = prompt_keys(seed, len(prompts))
        batch = self._conditions.batch(prompts, settings.template)
        negative = self._conditions.negative_batch(negative_prompt, settings)
        condition = self._conditions.of(batch)
        unconditional = self._conditions.unconditional(negative, settings)
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        image_keys = fold(keys, jnp.arange(n)).reshape(-1)
        rows = np.repeat(np.arange(len(prompts)), n)
        arrays = draw_in_batches(self._engine, condition, rows, image_keys, settings, unconditional)
        images = [Image.fromarray(array) for array in arrays]
        lists = [images[i * n : (i + 1) * n] for i in range(len(prompts))]
        return lists if is_list else lists[0]

    @overload
    def generate_document(self, prompt: Prompt, **settings: Unpack[DocumentSettings]) -> Document: ...
    @overload
    def generate_document(
        self, prompt: Sequence[Prompt], **settings: Unpack[DocumentSettings]
    ) -> list[Document]: ...
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
        seed: Seed = 0,
    ) -> Document | list[Document]:
        """Returns the document that continues a prompt; a list for a list of prompts.

        The model decides when to draw, draws, sees its own drawing, and writes on until it ends the document
        or has no room left (see `Document.finish_reason`). `max_new_tokens` limits the text, `max_images` the
        images.

        Raises:
          ValueError: a prompt exceeds the context, or the sampler is unknown.
        """
        prompts, is_list = as_list(prompt)
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
        self._conditions.check_sampler(settings)
        keys = prompt_keys(seed, len(prompts))
        batch = prompt_batch(prompts, self.tokenizer, self.config, settings.template)
        unconditional = None
        if self.config.draws:
            negative = self._conditions.negative_batch(negative_prompt, settings)
            unconditional = self._conditions.unconditional(negative, settings)
        documents = write_documents(self._engine, batch, keys, settings, unconditional)
        return documents if is_list else documents[0]

    def _check_not_rounded(self) -> None:
        if self._quantize is not None:
            raise ValueError(
                f"This model's weights are rounded to {self._quantize}, and a checkpoint's are not; load it "
                "without `quantize`."
            )

    def _settings(self, **given: Any) -> GenerationConfig:
        """Returns the settings of a call. Raises ValueError for a wrong type or an impossible value."""
        changes = {name: value for name, value in given.items() if value is not None}
        return build(GenerationConfig, to_dict(self.generation) | changes)


def _check_length(longest: int, max_new_tokens: int, context_length: int) -> None:
    if longest + max_new_tokens > context_length:
        raise ValueError(
            f"The longest prompt has {longest} tokens, and max_new_tokens is {max_new_tokens}; together they "
            f"exceed the model's context of {context_length}: shorten one of them."
        )


def _check_language_model(config: DreamLLMConfig, tokenizer: Tokenizer) -> None:
    if config.llama is None:
        raise ValueError("This model has no language model (model.llama is absent); DreamLLM needs one.")
    if tokenizer.vocab_size > config.llama.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model embeds "
            f"{config.llama.vocab_size}; they do not belong to the same model."
        )
