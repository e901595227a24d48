"""Conditions of the image decoder: prompts to the states that the U-Net attends to."""

from __future__ import annotations

import jax.numpy as jnp

from dreamllm_jax.batch import Batch
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.diffusion.sampling import make_plan
from dreamllm_jax.generate.decode import dream
from dreamllm_jax.generate.engine import Engine
from dreamllm_jax.generate.images import Condition, UnconditionalState
from dreamllm_jax.generate.prompts import Prompt, cache_capacity, longest_prompt, prompt_batch


class Conditions:
    """Computes the conditions of prompts; keeps those of negative prompts between calls."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._unconditional: dict[bytes, UnconditionalState] = {}  # by the tokens of the negative prompt

    def check_sampler(self, settings: GenerationConfig) -> None:
        """Checks the sampler with its number of steps and its eta.

        Raises:
          ValueError: the sampler is unknown, or does not take these values.
        """
        config = self._engine.config
        if config.draws:
            make_plan(config.schedule, settings.sampler, settings.num_inference_steps, settings.eta)

    def batch(self, prompts: list[Prompt], template: str | None) -> Batch:
        """Returns the rows of some prompts, each of which has room for a drawing at its end.

        Raises:
          ValueError: a prompt is too long for that, or cannot be read.
        """
        config = self._engine.config
        batch = prompt_batch(prompts, self._engine.tokenizer, config, template)
        longest, dream_tokens = longest_prompt(batch), config.num_dream_queries + 1
        if longest + dream_tokens > config.context_length:
            raise ValueError(
                f"The longest prompt has {longest} tokens; with {dream_tokens} for the dream it exceeds the "
                f"model's context of {config.context_length}: shorten it."
            )
        return batch

    def negative_batch(self, negative_prompt: str | None, settings: GenerationConfig) -> Batch:
        """Returns the one row of the negative prompt; None is the empty prompt, which takes no template."""
        if not isinstance(negative_prompt, str | None):
            raise ValueError(
                f"negative_prompt is a {type(negative_prompt).__name__}; give one string, which serves all "
                "prompts."
            )
        return self.batch([negative_prompt or ""], settings.template if negative_prompt else None)

    def of(self, batch: Batch) -> Condition:
        """Returns the U-Net's conditions of some prompts, each asked for a drawing at its end."""
        engine, config = self._engine, self._engine.config
        needed = longest_prompt(batch) + 1 + config.num_dream_queries
        start = jnp.int32(engine.tokenizer.special.dream_start)
        state = engine.read(batch, cache_capacity(needed, config.context_length))
        active = jnp.ones(batch.tokens.shape[0], bool)
        _, context, pooled = dream(engine.params, state, active, start, model=engine.module)
        return context, pooled

    def unconditional(self, negative: Batch, settings: GenerationConfig) -> UnconditionalState | None:
        """Returns the unconditional side of guidance; None where guidance is off (scale 1)."""
        if settings.guidance_scale == 1:
            return None
        key = negative.tokens.tobytes()
        if key not in self._unconditional:
            self._unconditional[key] = self.of(negative)
        return self._unconditional[key]
