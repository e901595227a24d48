"""Trains a recipe through its stages, resumable at any point.

Under the work folder:

    recipe.json               what is trained; a folder belongs to one recipe
    index/                    where the pairs of its webdataset tars lie, for all processes and restarts
    stages/<n>_<name>/states  train states within the stage (orbax)
    stages/<n>_<name>/logs    curves.jsonl, speed.jsonl, tensorboard
    stages/<n>_<name>/model   the model after the stage: `DreamLLM.from_pretrained` loads it
    stages/<n>_<name>/done.json  seconds, peak memory, data statistics; present when complete

Of several processes all run the same; process 0 writes and prints. The folder is on a filesystem that all
of them share. A run may go on with another number of processes, or another mesh, than it began with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from tqdm import tqdm

from dreamllm_jax import distributed
from dreamllm_jax.atomic import write_text
from dreamllm_jax.checkpoint.model_folder import open_pretrained, save_pretrained
from dreamllm_jax.checkpoint.train_states import StageCheckpoints
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.data.pipeline import BatchStream, batches, merge_iterator_states, statistics
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import Flat
from dreamllm_jax.sharding import make_mesh, process_row_indices, shard_batch
from dreamllm_jax.train.flops import step_flops
from dreamllm_jax.train.metrics import Meter, MetricWriter
from dreamllm_jax.train.optim import learning_rates
from dreamllm_jax.train.preparation import OpenModel, initial_params, prepare_index, prepare_tokenizer
from dreamllm_jax.train.recipe_checks import check_recipe
from dreamllm_jax.train.state import TrainState, create_state, final_params, stage_seed
from dreamllm_jax.train.step import train_step
from dreamllm_jax.train.throughput import Throughput


def stage_folder(workdir: Path, recipe: Recipe, stage: StageConfig) -> Path:
    """Where a stage keeps what it makes."""
    return workdir / "stages" / f"{recipe.stages.index(stage)}_{stage.name}"


def train(
    recipe: Recipe, workdir: Path, until: str | None = None, open_model: OpenModel = open_pretrained
) -> Path:
    """Runs every stage that is not done yet (up to the stage named `until`); returns the model's folder.

    Raises:
      ValueError: an unknown stage, a work folder of another recipe, a recipe that does not fit its
        model, the devices or the weights to start from (all of these before anything is compiled or
        written), processes with other recipes or work folders, a loss that is no longer finite.
      Preempted: the run got a SIGTERM; its state is saved.
    """
    meter = Meter()  # what comes before the first stage counts with it
    last = recipe.stages[-1] if until is None else recipe.stage(until)
    stages = recipe.stages[: recipe.stages.index(last) + 1]
    mesh = make_mesh(recipe.mesh)
    _check_folder(workdir, recipe)
    tokenizer = prepare_tokenizer(recipe)
    check_recipe(recipe, stages, mesh, tokenizer)
    distributed.check_equal_on_processes("recipe", _recipe_text(recipe))
    done = [(stage_folder(workdir, recipe, stage) / "done.json").exists() for stage in stages]
    point = program = None
    for stage, finished in zip(stages, distributed.broadcast_from_main(done), strict=True):
        folder = stage_folder(workdir, recipe, stage)
        if finished:
            distributed.print_on_main(f"{stage.name}: done")
        else:
            config, params = initial_params(recipe, open_model) if point is None else _load(point)
            _claim(workdir, recipe)
            if stage.compile_key() != program:
                jax.clear_caches()
                program = stage.compile_key()
            run_stage(recipe, stage, config, params, tokenizer, mesh, folder, meter)
            del params
            meter = Meter()
        point = folder / "model"
    assert point is not None
    return point


def run_stage(
    recipe: Recipe,
    stage: StageConfig,
    config: DreamLLMConfig,
    params: Flat,
    tokenizer: Tokenizer,
    mesh: Mesh,
    folder: Path,
    meter: Meter,
) -> None:
    """One stage from its beginning, or from its newest state, to its end; leaves what it made in `folder`.

    `folder` is the stage's in the work folder (`stage_folder`).
    """
    index = folder.parents[1] / "index"
    prepare_index(stage.data, index)
    with ExitStack() as stack:
        data = batches(
            stage.data,
            config,
            tokenizer,
            seed=stage_seed(recipe, stage),
            null_dream=stage.loss.condition_dropout > 0,
            numbers=process_row_indices(mesh, stage.data.batch_size),
            index_folder=index,
        )
        stack.callback(data.close)
        checkpoints = StageCheckpoints(folder / "states", recipe.checkpoint_every, recipe.keep_checkpoints)
        stack.callback(checkpoints.close)
        state = create_state(params, stage, recipe, mesh)
        if (found := checkpoints.restore(state)) is not None:
            state, place = found
            data.load_state(place["data"])
            meter.resume(place["meter"])
            distributed.print_on_main(f"{stage.name}: resumes after step {int(state.step)} of {stage.steps}")
        state = _run_steps(recipe, stage, config, state, data, mesh, checkpoints, meter, folder / "logs")
        params = final_params(state, params)
        if stage.objective == "vae":
            rows = shard_batch(next(data), mesh, stage.data.batch_size)
            config = with_measured_scale(config, params, distributed.to_host(rows.dream_images))
        counts = statistics(_run_position(data, meter)["data"], stage.data.length)
        _say_losses(stage, counts)
    save_pretrained(folder / "model", params, config, tokenizer, recipe.generation)
    summary = _run_position(data, meter)["meter"] | {"steps": stage.steps, "data": counts}
    if distributed.is_main():
        write_text(folder / "done.json", json.dumps(summary, indent=1))
        shutil.rmtree(folder / "states", ignore_errors=True)
    distributed.barrier(f"{stage.name} is done")


def _run_steps(
    recipe: Recipe,
    stage: StageConfig,
    config: DreamLLMConfig,
    state: TrainState,
    data: BatchStream,
    mesh: Mesh,
    checkpoints: StageCheckpoints,
    meter: Meter,
    logs: Path,
) -> TrainState:
    """The steps that are left."""
    model, program, start = DreamLLMModule(config), stage.compile_key(), int(state.step)
    rates = learning_rates(stage.optim, stage.steps)
    kind, slots = mesh.devices.flat[0].device_kind, stage.data.batch_size * stage.data.length
    speed = Throughput(step_flops(config, stage), mesh.size, kind, slots)
    shown = distributed.is_main()
    with (
        jax.set_mesh(mesh),
        distributed.PreemptionGuard() as guard,
        closing(MetricWriter(logs)) as writer,
        tqdm(total=stage.steps, initial=start, desc=stage.name, unit="step", disable=not shown) as bar,
    ):
        for step in range(start + 1, stage.steps + 1):
            rows = next(data)
            speed.count(rows)
            args = (state, shard_batch(rows, mesh, stage.data.batch_size), rates[step - 1])
            if step == start + 1 and distributed.is_multi_process():
                # Compiling takes each process another time; on CPUs the first collective waits 30 s only.
                train_step.lower(*args, model=model, stage=program).compile()
                distributed.barrier("compiled")
            state, metrics = train_step(*args, model=model, stage=program)
            del args
            if step == start + 1:  # compiled
                jax.block_until_ready(metrics)
                speed.restart()
            bar.update()
            preempted = guard.requested()
            last = step == stage.steps >= recipe.checkpoint_every  # writing the model takes its time
            due = preempted or last or checkpoints.due(step)
            if due or step % recipe.log_every == 0 or step == stage.steps:
                values = writer.write(step, metrics)
                _check_finite(stage, step, values)
                if pace := speed.read():
                    writer.write_speed(step, pace)
                bar.set_postfix_str(_postfix(values, pace))
            if due:
                checkpoints.save(step, state, _run_position(data, meter))
            if preempted:
                raise distributed.Preempted(
                    f"{stage.name}: asked to end; the state after step {step} of {stage.steps} is saved, and "
                    "the same command goes on from there."
                )
    return state


def _run_position(data: BatchStream, meter: Meter) -> dict[str, Any]:
    """Where all processes together are in the data, their longest time and largest memory."""
    found = distributed.all_gather({"data": data.state_dict(), "meter": meter.read()})
    meters = [place["meter"] for place in found]
    largest = {name: max(m[name] for m in meters) for name in meters[0]}
    return {"data": merge_iterator_states([place["data"] for place in found]), "meter": largest}


def _say_losses(stage: StageConfig, counts: dict[str, int | float]) -> None:
    """Nothing is lost silently: what was cut off or could not be read, in one line."""
    lost = {name: n for name, n in counts.items() if n and name.startswith(("dropped", "broken", "empty"))}
    if lost:
        listed = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in lost.items())
        distributed.print_on_main(f"{stage.name}: in {counts['documents']} documents {listed}")


def with_measured_scale(config: DreamLLMConfig, params: Flat, images: Any) -> DreamLLMConfig:
    """The config with the factor that gives the fresh VAE's latents unit variance (arXiv 2112.10752, G)."""
    assert config.vae is not None
    flat = jnp.asarray(images).reshape(-1, *images.shape[2:])
    encode = jax.jit(functools.partial(DreamLLMModule(config).apply, method=DreamLLMModule.encode_image))
    vae = {k: v for k, v in params.items() if k.startswith("vae/")}
    vae = {k: distributed.to_host(v) if isinstance(v, jax.Array) else v.read() for k, v in vae.items()}
    moments = encode({"params": unflatten_dict(vae, sep="/")}, flat)
    mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
    deviation = float(np.sqrt(mean.var() + np.exp(logvar).mean()))
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=1.0 / deviation))


def _check_folder(workdir: Path, recipe: Recipe) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; give a folder, which is made where it does not exist.")
    path = workdir / "recipe.json"
    if path.exists() and _learned(path.read_text(encoding="utf-8")) != _learned(_recipe_text(recipe)):
        raise ValueError(
            f"{workdir} holds a run of another recipe, or of other settings of it (recipe.json differs from "
            f"{recipe.name!r}); choose an empty folder, or remove this one."
        )


def _claim(workdir: Path, recipe: Recipe) -> None:
    """Writes the recipe into the work folder: from now on it is this recipe's."""
    distributed.check_shared_folder(workdir)
    if distributed.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "recipe.json", _recipe_text(recipe))


def _learned(text: str) -> dict[str, Any]:
    """Of a recipe.json what decides what is learned; where and how it is computed may change."""
    mapping = json.loads(text)
    for name in ("mesh", "checkpoint_every", "keep_checkpoints", "log_every"):
        mapping.pop(name, None)  # a folder of an earlier version may lack it
    for name in ("remat", "attention"):
        mapping["model"].pop(name, None)
    for stage in mapping["stages"]:
        for name in ("grad_accum_steps", "gather"):
            stage["optim"].pop(name, None)
    return mapping


def _recipe_text(recipe: Recipe) -> str:
    return json.dumps(to_dict(recipe), indent=1)


def _load(folder: Path) -> tuple[DreamLLMConfig, Flat]:
    distributed.wait_for_file(folder / "config.json")
    loaded = open_pretrained(folder)
    return loaded.config, loaded.params


def _check_finite(stage: StageConfig, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise ValueError(
            f"stage {stage.name!r}, step {step}: {', '.join(bad)} is not finite; lower optim.learning_rate "
            "or clip_norm, and train into an empty folder."
        )


def _postfix(values: dict[str, float], pace: dict[str, float]) -> str:
    shown = [
        f"{k} {v:.3f}"
        for k, v in values.items()
        if k.startswith("loss") or k in ("token_accuracy", "matched")
    ]
    if "tokens_per_second" in pace:
        shown.append(f"{pace['tokens_per_second']:.3g} tokens/s")
    if "mfu" in pace:
        shown.append(f"mfu {pace['mfu']:.2f}")
    return ", ".join(shown)
