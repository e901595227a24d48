"""What a run needs before its first step: the tokenizer, the initial parameters, the index of tars."""

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

# Opens the model that a recipe starts from. The commands pass a function that also reads PyTorch's formats.
OpenModel = Callable[[str], Pretrained]


def prepare_tokenizer(recipe: Recipe) -> Tokenizer:
    """Returns the tokenizer that a recipe names, or that of the model it starts from.

    Raises:
      ValueError: the recipe names neither, or the folder has no tokenizer.
    """
    config = recipe.tokenizer
    if config.corpus is not None:
        return train_tokenizer(resolve("corpus", config.corpus)(), config.vocab_size)
    folder = config.path or recipe.init_from
    if folder is None:
        raise ValueError(
            "tokenizer: the recipe does not name one; set tokenizer.path to a folder with a tokenizer."
        )
    return Tokenizer.load(folder)


def prepare_index(config: DataConfig, folder: Path) -> None:
    """Updates the index of the tars that a stage reads. Process 0 does so while the others wait.

    Raises:
      ValueError: a tar is missing, or is not a tar file.
      OSError: the index cannot be written, or this process cannot see it.
    """
    if not any(has_index(source) for source in config.sources):
        return
    files = distributed.run_on_main(lambda: [str(file) for file in index_sources(config.sources, folder)])
    for file in files:
        distributed.wait_for_file(Path(file))


def initial_params(recipe: Recipe, open_model: OpenModel = open_pretrained) -> tuple[DreamLLMConfig, Flat]:
    """Returns (config, parameters) at the beginning of a run.

    Parameters come from `recipe.init_from`, unread; those that it lacks, or all if there is no `init_from`,
    are newly initialized. Prints the towers that are newly initialized, and those of `init_from` that the
    recipe's model does not use.

    Raises:
      ValueError: `init_from` is not a model, a tensor's shape differs from the recipe's, or the latents have
        another scale.
    """
    expected = abstract_params(recipe.model)
    loaded = {} if recipe.init_from is None else _load_fitting(recipe, expected, open_model)
    fresh = init_on_host(recipe.model, jax.random.key(recipe.seed), expected.keys() - loaded.keys())
    if recipe.init_from is not None:
        for names, what in ((fresh, "newly initialized"), (loaded.keys() - expected.keys(), "not used")):
            towers = sorted({name.split("/")[0] for name in names})
            if towers:
                distributed.print_on_main(
                    f"{recipe.init_from}: {what}, {len(names)} tensors of {', '.join(towers)}"
                )
    return recipe.model, {k: fresh[k] if k in fresh else loaded[k] for k in expected}


def _load_fitting(recipe: Recipe, expected: Flat, open_model: OpenModel) -> Flat:
    """Returns the parameters of `init_from`, checked against the recipe's model."""
    assert recipe.init_from is not None
    pretrained = open_model(recipe.init_from)
    wrong = [
        f"{k} has shape {v.shape}, not {expected[k].shape}"
        for k, v in pretrained.params.items()
        if k in expected and v.shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(f"{recipe.init_from} does not fit the recipe's model: {'; '.join(wrong[:5])}.")
    theirs, ours = pretrained.config.vae, recipe.model.vae
    if theirs is not None and ours is not None and theirs.scaling_factor != ours.scaling_factor:
        raise ValueError(
            f"{recipe.init_from} has model.vae.scaling_factor={theirs.scaling_factor}, and the recipe has "
            f"{ours.scaling_factor}; its U-Net was trained on latents of its own scale: set the recipe's "
            "factor to it."
        )
    return pretrained.params
