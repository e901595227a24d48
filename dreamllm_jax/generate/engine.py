"""`Engine`: the module, its parameters on the devices and the tokenizer, shared by all generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import DreamLLMConfig, GenerationConfig
from dreamllm_jax.data.images import to_vision
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.generate.decode import DecodeRules, DecodeState, prefill
from dreamllm_jax.models.dreamllm import DreamLLMModule


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """A model that is ready to generate.

    `params` is the nested tree on the devices, in the layout of generation (see `layout`).
    """

    config: DreamLLMConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def module(self) -> DreamLLMModule:
        return DreamLLMModule(self.config, layered=True)

    def read(self, batch: Batch, capacity: int) -> DecodeState:
        """Runs prompts through the model into a KV cache with room for `capacity` tokens per row."""
        return prefill(self.params, jax.tree.map(jnp.asarray, batch), model=self.module, capacity=capacity)

    def control(
        self, stops: Sequence[int], may_dream: np.ndarray, dream_room: int, settings: GenerationConfig
    ) -> DecodeRules:
        """Returns rules under which only text, `</s>` and, where allowed, `<dream_start>` are decoded."""
        assert self.config.llama is not None
        special = self.tokenizer.special
        forbidden = np.zeros(self.config.llama.vocab_size, bool)
        forbidden[self.tokenizer.vocab_size :] = True
        forbidden[list(dataclasses.asdict(special).values())] = True
        forbidden[[special.eos, special.dream_start]] = False  # `bos` may be the same token as `eos`
        return DecodeRules(
            forbidden=jnp.asarray(forbidden),
            stops=jnp.asarray(stops, jnp.int32),
            dream_start=jnp.int32(special.dream_start),
            may_dream=jnp.asarray(may_dream),
            dream_room=jnp.int32(dream_room),
            temperature=jnp.float32(settings.temperature),
            top_p=jnp.float32(settings.top_p),
        )

    def to_vision_input(self, images: np.ndarray) -> jax.Array:
        """Resizes drawings (uint8 [B h w 3]) to the vision tower's size, as images from files are."""
        assert self.config.vision is not None
        return jnp.asarray(np.stack([to_vision(i, self.config.vision.image_size) for i in images]))


def prompt_keys(seed: int | Sequence[int], prompts: int) -> jax.Array:
    """Returns one random key per prompt. Prompt i of a batch with seed s gets the key of seed s + i.

    Raises:
      ValueError: a seed is not an integer in range, or there are not as many seeds as prompts.
    """
    seeds = [seed + i for i in range(prompts)] if isinstance(seed, int | np.integer) else seed
    if not isinstance(seeds, Sequence | np.ndarray) or not all(
        isinstance(s, int | np.integer) for s in seeds
    ):
        raise ValueError(f"seed is {seed!r}; give an int, or a list of them, one for each prompt.")
    if len(seeds) != prompts:
        raise ValueError(f"{len(seeds)} seeds for {prompts} prompts; give one seed each, or a single one.")
    outside = [int(s) for s in seeds if not 0 <= s < 1 << 32]
    if outside:
        raise ValueError(f"seed {outside[0]} is not between 0 and {(1 << 32) - 1}; choose another.")
    return jnp.stack([jax.random.key(int(s)) for s in seeds])
