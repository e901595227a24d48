"""Trains a recipe through its stages, resumable at any point.

Under the work folder:

    recipe.json               what is trained; a folder belongs to one recipe
    stages/<n>_<name>/states  train states within the stage (orbax)
    stages/<n>_<name>/logs    curves.jsonl, tensorboard
    stages/<n>_<name>/model   the model after the stage: `DreamLLM.from_pretrained` loads it
    stages/<n>_<name>/done.json  seconds, peak memory, data statistics; present when complete
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.model import DreamLLMConfig
from dreamllm_jax.config.train import Recipe, StageConfig
from dreamllm_jax.convert.pretrained import load_pretrained, save_pretrained
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.sharding import make_mesh, shard_batch
from dreamllm_jax.train.checkpoint import StageCheckpoints
from dreamllm_jax.train.metrics import Meter, MetricWriter
from dreamllm_jax.train.start import prepare_tokenizer, starting_point
from dreamllm_jax.train.state import Flat, create_state, final_params, nested
from dreamllm_jax.train.step import train_step


def stage_folder(workdir: Path, recipe: Recipe, stage: StageConfig) -> Path:
    """Where a stage keeps what it makes."""
    return workdir / "stages" / f"{recipe.stages.index(stage)}_{stage.name}"


def train(recipe: Recipe, workdir: Path, until: str | None = None) -> Path:
    """Runs every stage that is not done yet (up to the stage named `until`); returns the model's folder.

    Raises:
      ValueError: an unknown stage, a work folder of another recipe, a mesh or batch that does not
        fit the devices, a loss that is no longer finite.
    """
    last = recipe.stages[-1] if until is None else recipe.stage(until)
    mesh = make_mesh(recipe.mesh)
    _claim(workdir, recipe)
    tokenizer = prepare_tokenizer(recipe.tokenizer)
    _check_vocabulary(recipe.model, tokenizer)
    point = None
    for stage in recipe.stages[: recipe.stages.index(last) + 1]:
        folder = stage_folder(workdir, recipe, stage)
        if (folder / "done.json").exists():
            print(f"{stage.name}: done", flush=True)
            point = folder / "model"
            continue
        config, params = starting_point(recipe) if point is None else _load(point)
        config, params = run_stage(recipe, stage, config, params, tokenizer, mesh, folder)
        del params
        jax.clear_caches()
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
) -> tuple[DreamLLMConfig, Flat]:
    """One stage from its beginning, or from its newest state, to its end."""
    meter, model = Meter(), DreamLLMModule(config)
    state = create_state(params, stage, recipe, mesh)
    data = batches(
        stage.data,
        config,
        tokenizer,
        seed=recipe.seed,
        null_dream=stage.loss.condition_dropout > 0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    checkpoints = StageCheckpoints(folder / "states", recipe.checkpoint_every, recipe.keep_checkpoints)
    seconds_before = 0.0
    if (found := checkpoints.restore(state)) is not None:
        state, place = found
        data.load_state(place["data"])
        seconds_before = place["seconds"]
        print(f"{stage.name}: resumes after step {int(state.step)} of {stage.steps}", flush=True)
    writer = MetricWriter(folder / "logs")
    start = int(state.step)
    with jax.set_mesh(mesh), tqdm(total=stage.steps, initial=start, desc=stage.name, unit="step") as bar:
        for step in range(start + 1, stage.steps + 1):
            batch = shard_batch(next(data), mesh)
            state, metrics = train_step(state, batch, model=model, stage=stage)
            bar.update()
            if step % recipe.log_every == 0 or step == stage.steps:
                values = writer.write(step, metrics)
                _check_finite(stage, step, values)
                bar.set_postfix_str(_postfix(values))
            place = {"data": data.state_dict(), "seconds": seconds_before + meter.read()["seconds"]}
            checkpoints.save(step, state, place)
    checkpoints.close()
    writer.close()
    params = final_params(state)
    if stage.objective == "vae":
        config = with_measured_scale(config, params, next(data).dream_images)
    save_pretrained(folder / "model", params, config, tokenizer, recipe.generation)
    shutil.rmtree(folder / "states", ignore_errors=True)
    summary = meter.read()
    summary["seconds"] += seconds_before
    summary |= {"steps": stage.steps, "data": data.stats()}
    data.close()
    (folder / "done.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return config, params


def with_measured_scale(config: DreamLLMConfig, params: Flat, images: Any) -> DreamLLMConfig:
    """The config with the factor that gives the fresh VAE's latents unit variance (arXiv 2112.10752, G)."""
    assert config.vae is not None
    flat = jnp.asarray(images).reshape(-1, *images.shape[2:])
    moments = DreamLLMModule(config).apply({"params": nested(params)}, flat, method="encode_image")
    mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
    deviation = float(np.sqrt(mean.var() + np.exp(logvar).mean()))
    return dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=1.0 / deviation))


def _claim(workdir: Path, recipe: Recipe) -> None:
    """Writes the recipe into a new work folder, or checks that the folder is this recipe's."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, text = workdir / "recipe.json", json.dumps(to_dict(recipe), indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{workdir} holds a run of another recipe, or of other settings of it (recipe.json differs from "
            f"{recipe.name!r}); choose an empty folder, or remove this one."
        )
    path.write_text(text, encoding="utf-8")


def _load(folder: Path) -> tuple[DreamLLMConfig, Flat]:
    loaded = load_pretrained(folder)
    return loaded.config, loaded.params


def _check_vocabulary(config: DreamLLMConfig, tokenizer: Tokenizer) -> None:
    for name, tower in (("llama", config.llama), ("text", config.text)):
        if tower is not None and name == "llama" and tower.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.{name}.vocab_size is {tower.vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
                "tokens; raise it to at least that."
            )


def _check_finite(stage: StageConfig, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise ValueError(
            f"stage {stage.name!r}, step {step}: {', '.join(bad)} is not finite; lower optim.learning_rate or "
            "clip_norm, and run again: the stage resumes from its last checkpoint."
        )


def _postfix(values: dict[str, float]) -> str:
    shown = [
        f"{k} {v:.3f}"
        for k, v in values.items()
        if k.startswith("loss") or k in ("token_accuracy", "matched")
    ]
    return ", ".join(shown)
