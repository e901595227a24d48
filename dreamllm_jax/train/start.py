"""What a run starts from: the tokenizer and the weights."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import jax
import numpy as np

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, TokenizerConfig
from dreamllm_jax.convert.pretrained import load_pretrained
from dreamllm_jax.data import handwriting
from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.state import Flat, abstract_params, init_params


def prepare_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a recipe names.

    Raises:
      ValueError: the recipe names neither a folder nor a corpus, or the folder holds no tokenizer.
    """
    if config.corpus == "handwriting":
        return train_tokenizer(handwriting.corpus_text(), config.vocab_size)
    if config.path is None:
        raise ValueError("tokenizer: the recipe names none; set tokenizer.path to a folder with a tokenizer.")
    return Tokenizer.load(config.path)


def starting_point(recipe: Recipe) -> tuple[DreamLLMConfig, Flat]:
    """Weights of `recipe.init_from`, with fresh ones for what that folder lacks; or all fresh.

    Raises:
      ValueError: the folder is no pretrained model, or a tensor has another shape than the recipe's.
    """
    expected = abstract_params(recipe.model)
    loaded = {} if recipe.init_from is None else load_pretrained(Path(recipe.init_from)).params
    wrong = [
        f"{k}: {np.shape(v)} there, {expected[k].shape} in the recipe"
        for k, v in loaded.items()
        if k in expected and np.shape(v) != expected[k].shape
    ]
    if wrong:
        raise ValueError(f"{recipe.init_from} does not fit the recipe's model: {'; '.join(wrong[:5])}.")
    fresh = _draw(recipe, expected.keys() - loaded.keys())
    return recipe.model, {k: fresh[k] if k in fresh else loaded[k] for k in expected}


def _draw(recipe: Recipe, names: Set[str]) -> Flat:
    """Fresh parameters of these names, on the host; the others are not made."""
    if not names:
        return {}

    def init() -> Flat:
        params = init_params(DreamLLMModule(recipe.model), jax.random.key(recipe.seed))
        return {k: v for k, v in params.items() if k in names}

    # Run once: compiled quickly rather than well.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(init, compiler_options=options)())
