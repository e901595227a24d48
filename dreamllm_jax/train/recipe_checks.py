"""Checks a recipe against its model, mesh and data before anything is compiled or written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.registry import check_name
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.chat import template_of
from dreamllm_jax.data.pipeline import row_layout
from dreamllm_jax.data.sources import check_source
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.diffusion.sampling import make_plan
from dreamllm_jax.models.parameters import Flat, abstract_params
from dreamllm_jax.ops.attention.selection import MIN_KERNEL_LENGTH, select_implementation
from dreamllm_jax.sharding import parameter_shardings
from dreamllm_jax.train.hooks.make import custom_hook
from dreamllm_jax.train.hooks.validation import validation_data
from dreamllm_jax.train.optim import check_optimizer
from dreamllm_jax.train.state import partition

# The towers that an objective needs.
NEEDED_TOWERS = {
    "joint": ("llama",),
    "vae": ("vae",),
    "contrastive": ("vision", "text", "contrastive"),
    "diffusion": ("text", "unet", "vae"),
}


def check_recipe(recipe: Recipe, stages: Sequence[StageConfig], mesh: Mesh, tokenizer: Tokenizer) -> None:
    """Checks all stages that are about to run. No parameter is allocated.

    Raises:
      ValueError: the mesh does not divide the parameters or rows; a kernel is not available on its devices; a
        stage's trainable patterns, data or objective do not fit the model; an optimizer is unknown or
        unusable; the vocabulary is smaller than the tokenizer's.
    """
    _check_generation(recipe, tokenizer)
    check_attention_kernels(recipe.model, mesh)
    params = abstract_params(recipe.model)
    for stage in stages:
        try:
            _check_stage(stage, recipe.model, params, mesh, tokenizer)
            check_shardings(stage, params, mesh, recipe.mesh.replicated)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}: {error}") from error


def _check_generation(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Checks the generation settings that are saved with the trained model."""
    settings = recipe.generation
    try:
        check_name("sampler", settings.sampler)
        if recipe.model.draws:
            make_plan(recipe.model.schedule, settings.sampler, settings.num_inference_steps, settings.eta)
        if settings.template is not None:
            template_of(settings.template, tokenizer)
    except ValueError as error:
        raise ValueError(f"generation: {error}") from error


def check_attention_kernels(model: DreamLLMConfig, mesh: Mesh) -> None:
    """Checks that the mesh divides the heads, and that its devices have the kernels that the recipe names.

    Raises:
      ValueError: the mesh does not divide the heads, or a kernel is not available.
    """
    llama, split = model.llama, mesh.shape["tensor"]
    counts = () if llama is None else (llama.num_attention_heads, llama.num_key_value_heads)
    for what, heads in zip(("heads", "key-value heads"), counts, strict=False):
        assert heads is not None  # the config fills it in
        if heads % split:
            raise ValueError(
                f"mesh.tensor={split} does not divide the language model's {heads} {what}; choose a divisor."
            )
    for field in dataclasses.fields(model.attention):
        wanted = getattr(model.attention, field.name)
        length, platform = MIN_KERNEL_LENGTH, mesh.devices.flat[0].platform
        select_implementation(wanted, length, length, 64, model.dtype, None, platform)


def _check_stage(
    stage: StageConfig, model: DreamLLMConfig, params: Flat, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    trainable, _ = partition(params, stage.trainable)
    if not trainable:
        raise ValueError("trainable is empty; list the parts to train, for example 'llama'.")
    towers = NEEDED_TOWERS[stage.objective]
    absent = [name for name in towers if not getattr(model, name)]
    if absent:
        raise ValueError(f"objective {stage.objective!r} needs the model's {', '.join(absent)}; give it one.")
    if stage.objective == "diffusion" and model.unet is not None and model.unet.addition_embed_type:
        raise ValueError(
            "objective 'diffusion' conditions on the states of one text tower; a U-Net of SDXL also needs "
            "pooled text and sizes: load it from a checkpoint, and use objective 'joint'."
        )
    for name in {"llama", "text"} & set(towers):
        size = getattr(model, name).vocab_size
        if size < tokenizer.vocab_size:
            raise ValueError(
                f"model.{name}.vocab_size is {size}, but the tokenizer has {tokenizer.vocab_size} tokens; "
                "raise it to at least that."
            )
    if "text" in towers and model.text is not None and stage.data.length > model.text.max_position_embeddings:
        raise ValueError(
            f"data.length is {stage.data.length}; the text tower takes at most "
            f"{model.text.max_position_embeddings} tokens."
        )
    check_optimizer(stage.optim)
    _check_loss(stage, model)
    check_batch_size(stage, mesh)
    row_layout(stage.data, model, null_dream=stage.loss.condition_dropout > 0)
    check_source(stage.data, tokenizer)


def check_shardings(stage: StageConfig, params: Flat, mesh: Mesh, replicated: Sequence[str]) -> None:
    """Checks that every parameter can be sharded, and that replicated parts of the model are frozen.

    Raises:
      ValueError: no rule matches a parameter, the mesh does not divide it, or `replicated` names a part that
        is trained or does not exist.
    """
    trainable, frozen = partition(params, stage.trainable)
    for name in replicated:
        if name in {path.split("/")[0] for path in trainable}:
            raise ValueError(
                f"mesh.replicated names {name!r}, which this stage trains; only frozen parts can be "
                "replicated: remove it from the list."
            )
        if name not in {path.split("/")[0] for path in frozen}:
            raise ValueError(
                f"mesh.replicated names {name!r}, which the model does not have; its frozen parts are "
                f"{', '.join(sorted({path.split('/')[0] for path in frozen}))}."
            )
    parameter_shardings(trainable, mesh)
    parameter_shardings(frozen, mesh, replicated)


def check_hooks(
    recipe: Recipe, stages: Sequence[StageConfig], mesh: Mesh, tokenizer: Tokenizer, can_write: bool
) -> None:
    """Checks the hooks of the stages that are about to run.

    Raises:
      ValueError: held-out data is missing, or it does not fit the mesh or the model; a custom hook cannot be
        imported; samples are asked for, but `can_write` is False.
    """
    hooks = recipe.hooks
    for name in hooks.custom:
        custom_hook(name)
    if hooks.sample_every is not None and not can_write:
        raise ValueError(
            "hooks.sample_every needs a model class to write documents with; pass make_writer=DreamLLM to "
            "train, as the train command does."
        )
    for stage in stages if hooks.eval_every is not None else ():
        try:
            held_out = dataclasses.replace(
                stage,
                data=validation_data(hooks, stage),
                optim=dataclasses.replace(stage.optim, grad_accum_steps=1),
            )
            check_batch_size(held_out, mesh)
            row_layout(held_out.data, recipe.model, null_dream=stage.loss.condition_dropout > 0)
            check_source(held_out.data, tokenizer)
        except ValueError as error:
            raise ValueError(f"stage {stage.name!r}, validation: {error}") from error


def _check_loss(stage: StageConfig, model: DreamLLMConfig) -> None:
    """Refuses a stage whose loss would always be zero."""
    loss, data = stage.loss, stage.data
    needed = {"vae": "max_dreams", "diffusion": "max_dreams", "contrastive": "max_images"}
    if stage.objective in needed and getattr(data, needed[stage.objective]) < 1:
        raise ValueError(
            f"objective {stage.objective!r} needs images; set data.{needed[stage.objective]} to 1 or more."
        )
    dreams = data.max_dreams - (loss.condition_dropout > 0)
    has_dreams = loss.weight_vm and model.draws and dreams > 0
    if stage.objective == "joint" and not loss.weight_lm and not has_dreams:
        raise ValueError(
            f"nothing is learned: loss.weight_lm is 0, and with loss.weight_vm={loss.weight_vm:g} and "
            f"data.max_dreams={data.max_dreams} no image counts; raise one of the weights, or max_dreams."
        )


def check_batch_size(stage: StageConfig, mesh: Mesh) -> None:
    """Checks that devices and micro-batches divide the rows of a step, and devices the length of a row.

    Raises:
      ValueError: they do not, or a contrastive stage has micro-batches.
    """
    rows, parts = stage.data.batch_size, stage.optim.grad_accum_steps
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (split * parts):
        raise ValueError(
            f"data.batch_size={rows} is not divisible by the {split} devices along data and fsdp, times "
            f"optim.grad_accum_steps={parts}; choose a multiple of {split * parts}."
        )
    if stage.data.length % mesh.shape["context"]:
        raise ValueError(
            f"data.length={stage.data.length} is not divisible by mesh.context={mesh.shape['context']}; "
            "choose a multiple."
        )
    if parts > 1 and stage.objective == "contrastive":
        raise ValueError(
            f"optim.grad_accum_steps={parts} would contrast only the rows of one micro-batch; set it to 1 "
            "for a contrastive stage."
        )
