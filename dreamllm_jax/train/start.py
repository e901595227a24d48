"""What a run starts from: the tokenizer and the weights."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, TokenizerConfig
from dreamllm_jax.convert.pretrained import load_pretrained
from dreamllm_jax.data import handwriting
from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.state import Flat, init_params


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
    model = DreamLLMModule(recipe.model)
    # Run once: compiled quickly rather than well.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    fresh = jax.jit(lambda: init_params(model, jax.random.key(recipe.seed)), compiler_options=options)()
    if recipe.init_from is None:
        return recipe.model, fresh
    loaded = load_pretrained(Path(recipe.init_from)).params
    wrong = [
        f"{k}: {np.shape(v)} there, {fresh[k].shape} in the recipe"
        for k, v in loaded.items()
        if k in fresh and np.shape(v) != fresh[k].shape
    ]
    if wrong:
        raise ValueError(f"{recipe.init_from} does not fit the recipe's model: {'; '.join(wrong[:5])}.")
    return recipe.model, {k: loaded[k] if k in loaded else v for k, v in fresh.items()}
