"""Held-out losses: against the logits themselves, on any mesh, and from the command line."""

import dataclasses
import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax.checkpoint.model_folder import open_pretrained, write_pretrained
from dreamllm_jax.commands.main import main
from dreamllm_jax.config.model import GenerationConfig
from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.data.pipeline import batches
from dreamllm_jax.evaluate.losses import held_out_losses
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.train.held_out import held_out_seed
from dreamllm_jax.train.preparation import prepare_tokenizer
from dreamllm_jax.train.state import stage_seed
from tests.train import tiny

READING = {name: value for name, value in tiny.MODEL.items() if name not in ("unet", "vae", "schedule")}
RECIPE = dict(
    name="tiny",
    model=READING,
    tokenizer=dict(corpus=tiny.CORPUS, vocab_size=tiny.VOCABULARY),
    frozen_dtype="float32",
    stages=[
        dict(
            name="seeing",
            trainable=("vision_projector",),
            steps=1,
            optim=dict(grad_accum_steps=2),
            data=dict(
                source=tiny.SOURCE,
                source_options=dict(kinds=dict(pairs=1.0)),
                mode="comprehension",
                batch_size=16,
                length=64,
                max_images=2,
                max_dreams=0,
            ),
        )
    ],
)


def saved(folder, recipe):
    """A folder with a random model of the recipe, as a run leaves it."""
    params = tiny.random_params(recipe.model)
    write_pretrained(folder, params, recipe.model, prepare_tokenizer(recipe), GenerationConfig())
    return folder


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """The recipe of a model that only reads, and its folder."""
    recipe = build_recipe(RECIPE)
    return recipe, saved(tmp_path_factory.mktemp("reading") / "model", recipe)


def evaluate(recipe, folder, number=2):
    return held_out_losses(folder, open_pretrained(folder), recipe, recipe.stages[0], number)


def test_losses_are_those_of_the_logits(reading):
    """Log-softmax in numpy of all logits, over all supervised tokens of both batches together."""
    recipe, folder = reading
    found, stage = evaluate(recipe, folder), recipe.stages[0]
    loaded = open_pretrained(folder)
    params = unflatten_dict(
        {name: jnp.asarray(tensor.read()) for name, tensor in loaded.params.items()}, sep="/"
    )
    module, nll, right, tokens = DreamLLMModule(loaded.config), 0.0, 0.0, 0.0
    seed = held_out_seed(recipe, stage)
    assert seed != stage_seed(recipe, stage)
    data = dataclasses.replace(stage.data, batch_size=8)  # one micro-batch
    with closing(batches(data, loaded.config, loaded.tokenizer, seed=seed)) as stream:
        for batch in (next(stream), next(stream)):
            batch = jax.tree.map(jnp.asarray, batch)
            hidden = module.apply({"params": params}, batch, method=DreamLLMModule.read)
            logits = np.asarray(module.apply({"params": params}, hidden, method=DreamLLMModule.logits), float)
            top = logits.max(-1, keepdims=True)
            logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            own = np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
            nll -= (own * batch.loss_weights).sum()
            right += ((logits.argmax(-1) == batch.targets) * batch.loss_weights).sum()
            tokens += batch.loss_weights.sum()
    losses = found["losses"]
    np.testing.assert_allclose(losses["loss_lm"], nll / tokens, rtol=1e-5)
    np.testing.assert_allclose(losses["perplexity"], np.exp(nll / tokens), rtol=1e-5)
    np.testing.assert_allclose(losses["token_accuracy"], right / tokens, rtol=1e-6)
    assert found["tokens"] == tokens > 0 and found["rows"] == 16 and found["dreams"] == 0
    assert found["held_out"] and found["stage"] == "seeing" and "loss_vm" not in losses


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=4, context=2)])
def test_they_do_not_depend_on_the_mesh(reading, devices, mesh):
    recipe, folder = reading
    one = evaluate(recipe, folder)["losses"]
    other = evaluate(build_recipe({**RECIPE, "mesh": mesh}), folder)["losses"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=2e-5, err_msg=name)


def test_denoising(tmp_path):
    """A model that draws has a denoising loss, the same each time, and another one with another seed."""
    stage = RECIPE["stages"][0]
    data = {**stage["data"], "mode": "joint", "max_dreams": 2}
    mapping = {**RECIPE, "model": tiny.MODEL, "stages": [{**stage, "data": data}]}
    recipe = build_recipe(mapping)
    folder = saved(tmp_path / "model", recipe)
    first, again = (evaluate(recipe, folder, 1) for _ in range(2))
    assert first == again and first["losses"]["loss_vm"] > 0 and first["dreams"] > 0
    other = evaluate(build_recipe({**mapping, "seed": 1}), folder, 1)
    assert other["losses"]["loss_vm"] != first["losses"]["loss_vm"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from tests.evaluate.test_losses import RECIPE\n\ndef get_config(arg=None):\n    return RECIPE\n"
    )
    return f"--config={path}"


def test_the_command(reading, file, tmp_path, capsys):
    recipe, folder = reading
    out = tmp_path / "losses.json"
    assert main(["evaluate", str(folder), file, "--batches=2", f"--out={out}"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(out.read_text()) == evaluate(recipe, folder)
    assert "warning" not in printed.err


def test_what_cannot_be_evaluated(reading, file, capsys):
    _, folder = reading
    for words, sentence in (
        (["--batches=0"], "--batches=0: give at least 1"),
        (["--stage=stage9"], "has no stage 'stage9'"),
        (["--config.mesh.data=3"], "does not divide the"),
        (["--config.stages.seeing.trainable=('unet',)"], "matches no parameter of this model"),
        (["--config.stages.seeing.data.batch_size=12"], "is not divisible by"),
    ):
        assert main(["evaluate", str(folder), file, *words]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["evaluate", "nowhere", file]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_data_of_its_own(reading):
    """`hooks.validation` is evaluated in place of the stage's data."""
    recipe, folder = reading
    found = held_out_losses(
        folder,
        open_pretrained(folder),
        build_recipe({**RECIPE, "hooks": {"validation": {**RECIPE["stages"][0]["data"], "batch_size": 8}}}),
        recipe.stages[0],
        1,
    )
    assert found["held_out"] and found["rows"] == 8
