"""Trains a recipe through its stages. A run can be interrupted and resumed at any point.

`RunFolder` says what is in the work folder. All processes run the same code; process 0 prints and writes most
files. A run may resume with another number of processes, or on another mesh, than it began with.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dreamllm_jax import distributed
from dreamllm_jax.checkpoint.model_folder import open_pretrained, save_pretrained
from dreamllm_jax.config.chips import find_device
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import make_mesh, process_row_indices, shard_batch
from dreamllm_jax.train.flops import step_flops
from dreamllm_jax.train.hooks.make import make_hooks
from dreamllm_jax.train.hooks.protocol import HookList, Record
from dreamllm_jax.train.optim import learning_rates
from dreamllm_jax.train.preparation import OpenModel, initial_params, prepare_index, prepare_tokenizer
from dreamllm_jax.train.recipe_checks import check_hooks, check_recipe
from dreamllm_jax.train.resources import ResourceMeter
from dreamllm_jax.train.run_folder import RunFolder, recipe_text
from dreamllm_jax.train.stage_context import MakeWriter, StageContext
from dreamllm_jax.train.stage_progress import StageProgress
from dreamllm_jax.train.state import TrainState, create_state, final_params, stage_seed
from dreamllm_jax.train.step import compile_on_all_processes, train_step
from dreamllm_jax.train.throughput import Throughput
from dreamllm_jax.train.vae_scale import with_measured_scale


def train(
    recipe: Recipe,
    workdir: Path,
    until: str | None = None,
    open_model: OpenModel = open_pretrained,
    make_writer: MakeWriter | None = None,
) -> Path:
    """Runs every stage that is not done yet, up to the stage named `until`; returns the model's folder.

    `open_model` opens the model that `recipe.init_from` names. `make_writer`, for example `DreamLLM`, is
    needed for sample documents only.

    Raises:
      ValueError: an unknown stage; a work folder of another recipe; a recipe that does not fit its model, the
        devices or its initial weights; processes with different recipes or work folders. These are found
        before anything is compiled or written. Later, a loss that is not finite.
      Preempted: the run received a SIGTERM. Its state is saved.
    """
    resources = ResourceMeter()  # the first stage includes what precedes it
    last = recipe.stages[-1] if until is None else recipe.stage(until)
    stages = recipe.stages[: recipe.stages.index(last) + 1]
    mesh = make_mesh(recipe.mesh)
    run = RunFolder(workdir, recipe)
    run.check()
    tokenizer = prepare_tokenizer(recipe)
    check_recipe(recipe, stages, mesh, tokenizer)
    check_hooks(recipe, stages, mesh, tokenizer, can_write=make_writer is not None)
    distributed.check_equal_on_processes("recipe", recipe_text(recipe))
    done = distributed.broadcast_from_main([run.stage(stage).is_done() for stage in stages])
    model_folder = compile_key = None
    for stage, is_done in zip(stages, done, strict=True):
        folder = run.stage(stage)
        if is_done:
            distributed.print_on_main(f"{stage.name}: done")
        else:
            config, params = (
                initial_params(recipe, open_model) if model_folder is None else _load(model_folder, recipe)
            )
            run.claim()
            if stage.compile_key() != compile_key:
                jax.clear_caches()
                compile_key = stage.compile_key()
            context = StageContext(recipe, stage, config, tokenizer, mesh, folder, run.index, make_writer)
            run_stage(context, params, resources)
            del params
            resources = ResourceMeter()
        model_folder = folder.model
    assert model_folder is not None
    return model_folder


def run_stage(context: StageContext, params: Flat, resources: ResourceMeter) -> None:
    """Runs one stage from its beginning, or from its newest state, to its end, and saves the model."""
    recipe, stage, config, mesh = context.recipe, context.stage, context.config, context.mesh
    prepare_index(stage.data, context.index)
    with ExitStack() as stack:
        data = batches(
            stage.data,
            config,
            context.tokenizer,
            seed=stage_seed(recipe, stage),
            null_dream=stage.loss.condition_dropout > 0,
            row_indices=process_row_indices(mesh, stage.data.batch_size),
            index_folder=context.index,
        )
        stack.callback(data.close)
        progress = StageProgress(context, data, resources)
        stack.callback(progress.close)
        state = progress.restore(create_state(params, stage, recipe, mesh))
        state = _run_steps(context, state, progress)
        params = final_params(state, params)
        if stage.objective == "vae":
            batch = shard_batch(next(data), mesh, stage.data.batch_size)
            config = with_measured_scale(config, params, distributed.to_host(batch.dream_images))
        _print_dropped(stage, progress.summary()["data"])
    save_pretrained(context.folder.model, params, config, context.tokenizer, recipe.generation)
    context.folder.finish(progress.summary())
    distributed.barrier(f"{stage.name} is done")


def _run_steps(context: StageContext, state: TrainState, progress: StageProgress) -> TrainState:
    """Runs the steps that are left of a stage, and its hooks."""
    stage, mesh, start = context.stage, context.mesh, int(state.step)
    rates, options = learning_rates(stage.optim, stage.steps), _step_options(context)
    throughput = _throughput(context)
    with (
        jax.set_mesh(mesh),
        distributed.PreemptionGuard() as guard,
        closing(make_hooks(context)) as hooks,
        _progress_bar(stage, start) as bar,
    ):
        hooks.before_stage(context, state)
        throughput.restart()
        for step in range(start + 1, stage.steps + 1):
            batch = next(progress.data)
            throughput.count(batch)
            args = (state, shard_batch(batch, mesh, stage.data.batch_size), rates[step - 1])
            if step == start + 1:
                compile_on_all_processes(train_step, *args, **options)
            state, metrics = train_step(*args, **options)
            del args
            if step == start + 1:  # compiling does not count in the throughput
                jax.block_until_ready(metrics)
                throughput.restart()
            bar.update()
            preempted = guard.requested()
            # The last state is saved too, because writing the model takes time, if states are saved at all.
            last = step == stage.steps >= context.recipe.checkpoint_every
            due = preempted or last or progress.is_due(step)
            if due or step % context.recipe.log_every == 0 or step == stage.steps:
                _log(stage, step, metrics, throughput, hooks, bar)
            if due:
                progress.save(step, state)
            if preempted:
                raise distributed.Preempted(
                    f"{stage.name}: asked to end; the state after step {step} of {stage.steps} is saved. Run "
                    "the same command to resume."
                )
            if hooks.is_due(step):
                jax.block_until_ready(metrics)
                with throughput.paused():
                    hooks.after_step(step, state, metrics)
    return state


def _step_options(context: StageContext) -> dict:
    """Returns the static arguments of the train step."""
    return {"model": context.model, "stage": context.stage.compile_key()}


def _throughput(context: StageContext) -> Throughput:
    stage, mesh = context.stage, context.mesh
    device, slots = mesh.devices.flat[0], stage.data.batch_size * stage.data.length
    kind = device.device_kind
    if find_device(kind) is None and device.platform != "cpu":
        distributed.print_on_main(
            f"{stage.name}: no MFU is logged: dreamllm_jax/config/chips.py lacks {kind!r}; add its figures."
        )
    return Throughput(step_flops(context.config, stage), mesh.size, kind, slots)


def _progress_bar(stage: StageConfig, start: int) -> tqdm:
    shown = distributed.is_main()
    return tqdm(total=stage.steps, initial=start, desc=stage.name, unit="step", disable=not shown)


def _log(
    stage: StageConfig, step: int, metrics: dict, throughput: Throughput, hooks: HookList, bar: tqdm
) -> None:
    """Logs the metrics of a step and the throughput since the last log.

    Raises:
      ValueError: a metric is not finite.
    """
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    hooks.log(Record("curves", step, values))
    _check_finite(stage, step, values)
    if rates := throughput.read():
        hooks.log(Record("speed", step, rates))
    bar.set_postfix_str(_postfix(values, rates))


def _print_dropped(stage: StageConfig, counts: dict[str, int | float]) -> None:
    """Prints what was left out of the stage's documents or could not be read, in one line."""
    dropped = {name: n for name, n in counts.items() if n and name.startswith(("dropped", "broken", "empty"))}
    if dropped:
        listed = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in dropped.items())
        distributed.print_on_main(f"{stage.name}: left out of {counts['documents']} documents: {listed}")


def _load(folder: Path, recipe: Recipe) -> tuple[DreamLLMConfig, Flat]:
    """Returns the (config, parameters) that the previous stage saved, with the attention of the recipe.

    Saved models do not name their attention kernels, because these belong to the machine that trains.
    """
    distributed.wait_for_file(folder / "config.json")
    loaded = open_pretrained(folder)
    return dataclasses.replace(loaded.config, attention=recipe.model.attention), loaded.params


def _check_finite(stage: StageConfig, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise ValueError(
            f"stage {stage.name!r}, step {step}: {', '.join(bad)} is not finite; lower optim.learning_rate "
            "or clip_norm, and train into an empty folder."
        )


def _postfix(values: dict[str, float], rates: dict[str, float]) -> str:
    """Returns the losses and the speed, for the progress bar."""
    shown = [
        f"{k} {v:.3f}"
        for k, v in values.items()
        if k.startswith("loss") or k in ("token_accuracy", "matched")
    ]
    if "tokens_per_second" in rates:
        shown.append(f"{rates['tokens_per_second']:.3g} tokens/s")
    if "mfu" in rates:
        shown.append(f"mfu {rates['mfu']:.2f}")
    return ", ".join(shown)
