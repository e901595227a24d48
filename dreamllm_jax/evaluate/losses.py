"""Held-out losses of a saved model: next-token loss, perplexity, token accuracy, denoising loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from dreamllm_jax.checkpoint.model_folder import Pretrained, check_complete
from dreamllm_jax.checkpoint.parameter_files import to_device
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.held_out import HeldOutBatches, with_fewer_rows
from dreamllm_jax.train.recipe_checks import check_recipe
from dreamllm_jax.train.state import abstract_state


def held_out_losses(
    folder: str | Path, model: Pretrained, recipe: Recipe, stage: StageConfig, batches: int
) -> dict[str, Any]:
    """Returns the losses of `model`, opened from `folder`, on `batches` held-out batches of a stage.

    The batches come from the recipe's `hooks.validation` if it is set, otherwise from the stage's data with
    another seed than training's. Only an endless source has other documents then: if the stage reads files,
    `held_out` is False. The weights are sharded over the recipe's mesh, in the dtypes of training.
    Every process calls this, and gets the same result.

    Example of a result:

        {"model": "run/stages/3_stage3/model", "recipe": "stage3", "stage": "stage3", "batches": 8,
         "held_out": true, "rows": 128, "tokens": 20134, "dreams": 96,
         "losses": {"loss_lm": 1.2, "perplexity": 3.3, "token_accuracy": 0.7, "loss_vm": 0.1, "loss": 2.2}}

    Raises:
      ValueError: the folder is incomplete; the recipe does not fit the model or the devices.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; it must be at least 1.")
    check_complete(folder, model.config, model.params)
    # Kernels and rematerialization belong to the machine, not to the saved model.
    config = dataclasses.replace(
        model.config, attention=recipe.model.attention, remat=recipe.model.remat, dtype=recipe.model.dtype
    )
    data = with_fewer_rows(stage) if recipe.hooks.validation is None else recipe.hooks.validation
    recipe = dataclasses.replace(recipe, model=config)
    mesh = make_mesh(recipe.mesh)
    once = dataclasses.replace(stage.optim, grad_accum_steps=1)
    check_recipe(recipe, [dataclasses.replace(stage, data=data, optim=once)], mesh, model.tokenizer)
    held_out = HeldOutBatches(recipe, stage, config, model.tokenizer, mesh, data, batches, index=None)
    shapes = abstract_state(model.params, stage, recipe, mesh)
    trainable, frozen = (
        {name: to_device(model.params[name], x.sharding, x.dtype) for name, x in part.items()}
        for part in (shapes.trainable, shapes.frozen)
    )
    with jax.set_mesh(mesh):
        losses = held_out.losses(trainable, frozen)
    if "loss_lm" in losses:
        losses["perplexity"] = math.exp(min(losses["loss_lm"], 700.0))  # exp(710) is infinite
    return {
        "model": str(folder),
        "recipe": recipe.name,
        "stage": stage.name,
        "batches": batches,
        "held_out": recipe.hooks.validation is not None or not stage.data.sources,
        "rows": int(held_out.rows),
        "tokens": int(held_out.tokens),
        "dreams": int(held_out.dreams),
        "losses": losses,
    }
