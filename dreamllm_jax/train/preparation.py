"""What a run starts from: the tokenizer, the weights, the index of its tars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from dreamllm_jax import distributed
from dreamllm_jax.checkpoint.model_folder import Pretrained, open_pretrained
from dreamllm_jax.config.data import DataConfig
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.registry import resolve
from dreamllm_jax.config.train import Recipe
from dreamllm_jax.data.mixture import has_index, index_sources
from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from dreamllm_jax.models.parameters import Flat, abstract_params, init_on_host

# Opens the model that a recipe starts from; commands pass one that also reads PyTorch's formats.
OpenModel = Callable[[str], Pretrained]


def prepare_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer that a recipe names, or that of the weights it starts from.

    Raises:
      ValueError: there is neither, or the folder holds no tokenizer.
    """
    config = recipe.tokenizer
    if config.corpus is not None:
        return train_tokenizer(resolve("corpus", config.corpus)(), config.vocab_size)
    folder = config.path or recipe.init_from
    if folder is None:
        raise ValueError("tokenizer: the recipe names none; set tokenizer.path to a folder with a tokenizer.")
    return Tokenizer.load(folder)


def prepare_index(config: DataConfig, folder: Path) -> None:
    """Process 0 brings the index of a stage's tars up to date, in a folder that all see; the others wait.

    Raises:
      ValueError: a tar is missing, or is none.
      OSError: the index cannot be written, or not be seen by this process.
    """
    if not any(has_index(source) for source in config.sources):
        return
    files = distributed.run_on_main(lambda: [str(file) for file in index_sources(config.sources, folder)])
    for file in files:
        distributed.wait_for_file(Path(file))


def initial_params(recipe: Recipe, open_model: OpenModel = open_pretrained) -> tuple[DreamLLMConfig, Flat]:
    """Weights of `recipe.init_from`, unread, with fresh ones for what that folder lacks; or all fresh.

    Says which towers are fresh, and which of the folder's the model has no place for.

    Raises:
      ValueError: the folder is no pretrained model, a tensor has another shape than the recipe's, or its
        latents another scale.
    """
    expected = abstract_params(recipe.model)
    loaded = {} if recipe.init_from is None else _load_fitting(recipe, expected, open_model)
    fresh = init_on_host(recipe.model, jax.random.key(recipe.seed), expected.keys() - loaded.keys())
    if recipe.init_from is not None:
        for names, what in ((fresh, "drawn afresh"), (loaded.keys() - expected.keys(), "left out")):
            towers = sorted({name.split("/")[0] for name in names})
            if towers:
                distributed.print_on_main(
                    f"{recipe.init_from}: {what}, {len(names)} tensors of {', '.join(towers)}"
                )
    return recipe.model, {k: fresh[k] if k in fresh else loaded[k] for k in expected}


def _load_fitting(recipe: Recipe, expected: Flat, open_model: OpenModel) -> Flat:
    """The parameters of `init_from`, checked against the recipe's model."""
    assert recipe.init_from is not None
    pretrained = open_model(recipe.init_from)
    wrong = [
        f"{k}: {v.shape} there, {expected[k].shape} in the recipe"
        for k, v in pretrained.params.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(f"{recipe.init_from} does not fit the recipe's model: {'; '.join(wrong[:5])}.")
    theirs, ours = pretrained.config.vae, recipe.model.vae
    if theirs is not None and ours is not None and theirs.scaling_factor != ours.scaling_factor:
        raise ValueError(
            f"{recipe.init_from} has model.vae.scaling_factor={theirs.scaling_factor}, the recipe "
            f"{ours.scaling_factor}; its U-Net knows latents of its own scale: set the recipe's to that."
        )
    return pretrained.params
