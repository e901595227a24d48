"""A tiny recipe from beginning to end: frozen, trained and averaged parameters, hooks, and interruptions."""

import dataclasses
import importlib
import json
import re
import shutil
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax import DreamLLM
from dreamllm_jax.checkpoint.model_folder import open_pretrained
from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train import loop, preparation
from dreamllm_jax.train.held_out import held_out_seed
from dreamllm_jax.train.hooks.loggers import read_curves
from dreamllm_jax.train.hooks.protocol import Hook, Record
from dreamllm_jax.train.hooks.validation import validation_data
from dreamllm_jax.train.objectives import loss_counts
from dreamllm_jax.train.optim import learning_rates
from dreamllm_jax.train.state import partition, stage_seed
from dreamllm_jax.train.step import loss_and_metrics, row_prng_keys
from dreamllm_jax.train.vae_scale import with_measured_scale
from tests.folders import load_pretrained
from tests.train import tiny
from tests.train.tiny_recipe import CONNECTORS, DECAY, RECIPE, TEXT, changed


class Spy:
    """Replaces `train_step`: records the parameters of every step, and may interrupt a run."""

    def __init__(self, dies_before=None):
        self.states, self.dies_before = {}, dies_before
        self.step = loop.train_step

    def __call__(self, state, *args, **options):
        step = int(state.step) + 1
        if step == self.dies_before:
            raise KeyboardInterrupt
        before = jax.tree.map(np.array, (state.trainable, state.ema))
        frozen = jax.tree.map(np.array, state.frozen)
        state, metrics = self.step(state, *args, **options)
        jax.tree.map(np.testing.assert_array_equal, frozen, jax.tree.map(np.array, state.frozen))
        after = jax.tree.map(np.array, (state.trainable, state.ema))
        self.states[step] = SimpleNamespace(
            before=before[0], ema_before=before[1], trainable=after[0], ema=after[1]
        )
        return state, metrics


def run(monkeypatch, folder, until=None, dies_before=None, recipe=RECIPE, **options):
    spy = Spy(dies_before)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", spy)
        model = loop.train(build_recipe(recipe), folder, until, **options)
    return model, spy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, in two parts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        vae, _ = run(patch, folder, until="vae")
        beginning = tmp_path_factory.mktemp("beginning") / "copy"
        shutil.copytree(folder, beginning)
        shutil.copytree(folder, beginning.with_name("hooked"))
        joint, spy = run(patch, folder)
    return SimpleNamespace(folder=folder, vae=vae, joint=joint, steps=spy.states, beginning=beginning)


def test_stages_follow_one_another(whole):
    assert whole.vae == whole.folder / "stages" / "0_vae" / "model"
    assert whole.joint == whole.folder / "stages" / "1_joint" / "model"
    assert list(whole.steps) == [1, 2, 3, 4, 5]
    before, after = load_pretrained(whole.vae), load_pretrained(whole.joint)
    assert before.config.vae.scaling_factor != tiny.config().vae.scaling_factor
    assert after.config == before.config
    trainable, frozen = partition(after.params, CONNECTORS)
    assert len(trainable) == 4 and len(frozen) > 100
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, before.params[path], err_msg=path)
    for path, value in trainable.items():
        assert (value != before.params[path]).mean() > 0.9, path
        np.testing.assert_array_equal(value, whole.steps[5].ema[path])  # the average is what stays
        np.testing.assert_array_equal(whole.steps[1].before[path], before.params[path])


def test_the_first_stage_trains_its_tower_alone(whole):
    fresh = preparation.initial_params(build_recipe(RECIPE))[1]
    trained = load_pretrained(whole.vae).params
    assert trained.keys() == fresh.keys()
    moved = {path for path in fresh if (np.asarray(fresh[path]) != trained[path]).any()}
    assert moved == {path for path in fresh if path.startswith("vae/")}


def test_a_later_stage_has_the_attention_of_the_recipe(whole):
    """Saved models do not name it."""
    recipe = build_recipe(RECIPE)
    chunked = dataclasses.replace(recipe.model, attention=AttentionConfig(llama="chunked"))
    config, _ = loop._load(whole.joint, dataclasses.replace(recipe, model=chunked))
    assert config.attention == AttentionConfig(llama="chunked") != recipe.model.attention


def test_the_speed_of_every_step_is_logged(whole):
    lines = (whole.folder / "stages" / "1_joint" / "logs" / "speed.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == [2, 3, 4, 5]  # the step that compiled is left out
    for record in records:
        assert 0 <= record["pad_share"] < 1 and record["tokens_per_second"] > 0
        towers = {n.split("/")[1] for n in record if n.startswith("tflops_per_device/")}
        assert (
            towers == {"llama", "vision", "unet", "vae"} and "mfu" not in record
        )  # a CPU's peak is not known


def test_measured_scale_gives_latents_unit_variance(whole):
    config = load_pretrained(whole.vae).config
    params = load_pretrained(whole.vae).params
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 8, 3)).astype(np.uint8)
    unread = open_pretrained(whole.vae).params
    measured = with_measured_scale(config, unread, images).vae.scaling_factor
    variables = {"params": unflatten_dict({k: jnp.asarray(v) for k, v in params.items()}, sep="/")}
    flat = jnp.asarray(images.reshape(-1, 8, 8, 3))
    moments = DreamLLMModule(config).apply(variables, flat, method=DreamLLMModule.encode_image)
    mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    noise = np.random.default_rng(1).normal(size=(50, *mean.shape))
    latents = (mean + np.exp(logvar / 2) * noise) * measured
    assert abs(latents.std() - 1) < 0.02


def test_the_average_of_the_weights(whole):
    for step, seen in whole.steps.items():
        decay = min(DECAY, step / (9 + step))
        for path, average in seen.ema.items():
            expected = decay * seen.ema_before[path] + (1 - decay) * seen.trainable[path]
            np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
    # Both sides of the minimum were seen.
    assert {step / (9 + step) < DECAY for step in whole.steps} == {True, False}


def test_curves(whole):
    records = list(read_curves(whole.folder / "stages" / "1_joint" / "logs"))
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    stage = build_recipe(RECIPE).stages[1]
    rates = learning_rates(stage.optim, stage.steps)
    for i, record in enumerate(records):
        assert {"loss_lm", "loss_vm", "token_accuracy", "grad_norm", "tokens", "dreams"} <= record.keys()
        np.testing.assert_allclose(record["learning_rate"], rates[i], rtol=1e-6)
        assert record["dreams"] > 0 and record["tokens"] > 0 and np.isfinite(list(record.values())).all()


def test_what_a_finished_stage_leaves(whole):
    folder = whole.folder / "stages" / "1_joint"
    assert sorted(p.name for p in folder.iterdir()) == ["done.json", "logs", "model"]
    done = json.loads((folder / "done.json").read_text())
    assert done["steps"] == 5 and done["seconds"] > 0 and done["peak_rss_gib"] > 0.05
    assert done["data"]["documents"] > 8 * 5


def test_what_documents_lost_is_said(capsys):
    counts = {"documents": 9, "tokens": 100, "dropped_images": 2, "dropped_tokens": 0, "broken_images": 1}
    stage = build_recipe(RECIPE).stages[1]
    loop._print_dropped(stage, counts)
    assert capsys.readouterr().out == "joint: left out of 9 documents: 2 dropped images, 1 broken images\n"
    loop._print_dropped(stage, counts | {"dropped_images": 0, "broken_images": 0})
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys):
    monkeypatch.setattr(loop, "run_stage", None)
    assert loop.train(build_recipe(RECIPE), whole.folder) == whole.joint
    assert capsys.readouterr().out.splitlines() == ["vae: done", "joint: done"]


def test_resuming_goes_on_bit_by_bit(whole, monkeypatch, capsys):
    folder = whole.beginning
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, folder, dies_before=4)
    assert (folder / "stages" / "0_vae" / "done.json").exists()
    assert not (folder / "stages" / "1_joint" / "done.json").exists()
    with (folder / "stages" / "1_joint" / "logs" / "curves.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the crash cut a line short
    model, spy = run(monkeypatch, folder)
    assert "joint: resumes after step 2 of 5" in capsys.readouterr().out
    assert list(spy.states) == [3, 4, 5]
    for step, seen in spy.states.items():
        for name in ("before", "ema_before", "trainable", "ema"):
            ours, theirs = getattr(seen, name), getattr(whole.steps[step], name)
            for path, value in theirs.items():
                np.testing.assert_array_equal(ours[path], value, err_msg=f"step {step}: {name} {path}")
    again, once = load_pretrained(model).params, load_pretrained(whole.joint).params
    for path, value in once.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    logs = [list(read_curves(f / "stages" / "1_joint" / "logs")) for f in (folder, whole.folder)]
    assert logs[0] == logs[1]


class Recorder(Hook):
    """A custom hook that records its calls."""

    told: list

    def before_stage(self, context, state, log):
        self.told.append((context.stage.name, int(state.step)))
        self._log = log

    def is_due(self, step):
        return step == 3

    def after_step(self, step, state, metrics):
        self.told.append((step, int(state.step), float(metrics["loss"])))
        self._log(Record("own", step, {"seen": 1.0}))

    def log(self, record):
        self.told.append((record.series, record.step))

    def after_stage(self):
        self.told.append("end")


HOOKS = dict(
    eval_every=2,
    eval_batches=2,
    sample_every=4,
    sample_prompts=("Write one.", "Which"),
    profile_steps=(3, 4),
    custom=("tests.train.test_loop:Recorder",),
)


def brief_writer(*args):
    """Makes a `DreamLLM` that writes short documents."""
    model = DreamLLM(*args)

    def generate_document(prompts, *, seed):
        return model.generate_document(prompts, seed=seed, max_new_tokens=4, max_images=0)

    return SimpleNamespace(generate_document=generate_document)


def test_hooks_run_and_change_nothing(whole, monkeypatch):
    monkeypatch.setattr(Recorder, "told", [], raising=False)
    monkeypatch.setattr(importlib.import_module("tests.train.test_loop"), "Recorder", Recorder)
    folder = whole.beginning.with_name("hooked")
    _, spy = run(monkeypatch, folder, recipe=RECIPE | {"hooks": HOOKS}, make_writer=brief_writer)
    for step, seen in spy.states.items():
        for path, value in whole.steps[step].trainable.items():
            np.testing.assert_array_equal(seen.trainable[path], value, err_msg=f"step {step}: {path}")
    stage = folder / "stages" / "1_joint"
    curves = [list(read_curves(f / "stages" / "1_joint" / "logs")) for f in (folder, whole.folder)]
    assert curves[0] == curves[1]
    # Samples: one page for each prompt, every four steps and at the end.
    pages = sorted(str(path.relative_to(stage / "samples")) for path in (stage / "samples").rglob("*.html"))
    assert pages == [f"step_{step:08d}/{i}.html" for step in (4, 5) for i in (0, 1)]
    assert "<" in (stage / "samples" / pages[-1]).read_text()
    assert [*(stage / "logs" / "profile").rglob("*.xplane.pb")]
    # The custom hook receives all records, its own included.
    told = Recorder.told
    assert told[0] == ("joint", 0) and told[-1] == "end" and told.count("end") == 1
    assert (3, 3, pytest.approx(curves[0][2]["loss"])) in told and ("own", 3) in told
    assert [t[1] for t in told if t[0] == "validation"] == [2, 4, 5]
    assert_validation(whole, list(read_curves(stage / "logs", "validation")))


def assert_validation(whole, records):
    """The last record is the objective on all held-out rows as one batch, with the averaged parameters."""
    assert [r["step"] for r in records] == [2, 4, 5] and len({r["loss"] for r in records}) == 3
    recipe = build_recipe(RECIPE | {"hooks": HOOKS})
    stage, saved = recipe.stages[1], load_pretrained(whole.joint)
    data, seed = validation_data(recipe.hooks, stage), held_out_seed(recipe, stage)
    assert data == stage.data and seed != stage_seed(recipe, stage)
    tokenizer = preparation.prepare_tokenizer(recipe)
    with closing(batches(data, saved.config, tokenizer, seed=seed, null_dream=True)) as stream:
        held_out = [next(stream), next(stream)]
    batch = jax.tree.map(lambda *rows: np.concatenate(rows), *held_out)
    key = jax.random.fold_in(jax.random.key(recipe.seed), seed % 2**32)
    keys = jnp.concatenate([row_prng_keys(key, jnp.int32(i), data.batch_size) for i in (0, 1)])
    expected = jax.jit(loss_and_metrics, static_argnames=("model", "stage"))(
        saved.params,
        {},
        batch,
        keys,
        loss_counts(batch),
        model=DreamLLMModule(saved.config),
        stage=stage.compile_key(),
    )[1]
    for name, value in expected.items():
        np.testing.assert_allclose(records[-1][name], value, rtol=2e-5, err_msg=name)


def test_a_folder_of_another_recipe(whole, monkeypatch):
    monkeypatch.setattr(loop, "run_stage", None)
    before = (whole.folder / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run of another recipe.*choose an empty folder"):
        loop.train(build_recipe(changed("seed", 1)), whole.folder)
    assert (whole.folder / "recipe.json").read_bytes() == before


def test_weights_of_another_shape(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "init_on_host", None)
    mapping = changed("init_from", str(whole.joint))
    mapping["model"] = {**tiny.MODEL, "num_dream_queries": 5}
    with pytest.raises(
        ValueError, match=r"does not fit .* dream_queries/dream_queries has shape \(4, 64\), not \(5, 64\)"
    ):
        loop.train(build_recipe(mapping), tmp_path / "work")


def test_latents_of_another_scale(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "init_on_host", None)
    with pytest.raises(
        ValueError, match=r"has model.vae.scaling_factor=.* latents of its own scale: set the recipe"
    ):
        loop.train(build_recipe(changed("init_from", str(whole.joint))), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_weights_that_a_folder_lacks_are_drawn(whole, monkeypatch, capsys):
    theirs = load_pretrained(whole.joint)
    mapping = changed("init_from", str(whole.joint))
    vae = {**tiny.MODEL["vae"], "scaling_factor": theirs.config.vae.scaling_factor}
    mapping["model"] = {**tiny.MODEL, "vae": vae, "contrastive": True, "text": TEXT}
    monkeypatch.setattr(preparation, "init_on_host", lambda config, key, names: dict.fromkeys(names, "drawn"))
    params = preparation.initial_params(build_recipe(mapping))[1]
    drawn = {path for path, value in params.items() if isinstance(value, str)}
    assert {path.split("/")[0] for path in drawn} == {"text", "contrastive"}
    assert f"newly initialized, {len(drawn)} tensors of contrastive, text" in capsys.readouterr().out
    assert params.keys() - drawn == theirs.params.keys()
    for path, value in theirs.params.items():
        np.testing.assert_array_equal(params[path].read(), value)


def test_weights_without_a_place_are_named(whole, capsys):
    mapping = changed("init_from", str(whole.joint))
    mapping["model"] = {k: v for k, v in tiny.MODEL.items() if k == "llama"}
    params = preparation.initial_params(build_recipe(mapping))[1]
    assert {path.split("/")[0] for path in params} == {"llama"}
    assert re.search(r"not used, \d+ tensors of condition_projector, .*vision", capsys.readouterr().out)


def test_the_tokenizer_of_the_weights(whole):
    mapping = changed("init_from", str(whole.joint)) | {"tokenizer": {}}
    ours, theirs = (
        preparation.prepare_tokenizer(build_recipe(mapping)),
        load_pretrained(whole.joint).tokenizer,
    )
    assert ours.encode("a handwritten seven") == theirs.encode("a handwritten seven")


def test_a_loss_that_is_no_longer_finite():
    stage = build_recipe(RECIPE).stages[1]
    loop._check_finite(stage, 3, {"loss_lm": 1.0})
    with pytest.raises(ValueError, match="stage 'joint', step 3: loss_vm, grad_norm is not finite; lower"):
        loop._check_finite(stage, 3, {"loss_lm": 1.0, "loss_vm": float("nan"), "grad_norm": float("inf")})
