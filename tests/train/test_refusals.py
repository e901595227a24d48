"""Recipes that cannot be trained: one sentence each, before anything is read or compiled."""

import pytest

from dreamllm_jax.config.train import build_recipe
from dreamllm_jax.train import loop, preparation
from tests.train import tiny
from tests.train.tiny_recipe import RECIPE, STAGE, TEXT, changed


def with_llama(**changes):
    return {**tiny.MODEL, "llama": {**tiny.MODEL["llama"], **changes}}


UNFIT = {
    "an unknown stage": (RECIPE, "stage4", "recipe 'tiny' has no stage 'stage4'; its stages: vae, joint."),
    "a mesh of another size": (changed("mesh", dict(data=3, fsdp=1)), None, "does not match the 8 devices"),
    "two open axes": (changed("mesh", dict(data=-1, fsdp=-1)), None, "at most one may be -1"),
    "rows": (
        changed("stages", 1, "data", "batch_size", 12),
        None,
        "stage 'joint': data.batch_size=12 is not divisible by",
    ),
    "a length": (
        changed("mesh", dict(fsdp=1, context=8))
        | {"stages": [{**STAGE, "data": {**STAGE["data"], "length": 66}}]},
        None,
        "data.length=66 is not divisible by mesh.context=8",
    ),
    "heads": (
        changed("mesh", dict(fsdp=1, tensor=8)) | {"model": with_llama(num_attention_heads=4)},
        None,
        "mesh.tensor=8 does not divide the language model's 4 heads",
    ),
    "micro-batches": (changed("stages", 1, "optim", "grad_accum_steps", 2), None, "choose a multiple of 16"),
    "no micro-batches": (
        changed("stages", 1, "optim", "grad_accum_steps", 0),
        None,
        "stages[1].optim.grad_accum_steps is 0; it must be at least 1.",
    ),
    "no steps": (changed("stages", 1, "steps", 0), None, "stages[1]: steps is 0; it must be at least 1."),
    "a rate": (
        changed("stages", 1, "optim", "learning_rate", -1.0),
        None,
        "optim.learning_rate is -1.0; it must be positive.",
    ),
    "an SDXL U-Net without its text": (
        changed("stages", 0, "objective", "diffusion")
        | {"model": {**tiny.MODEL, "text": TEXT, "unet": {**tiny.MODEL["unet"], **tiny.SDXL_CONDITIONS}}},
        None,
        "a U-Net of SDXL also needs pooled text and sizes",
    ),
    "a parameter": (
        changed("mesh", dict(fsdp=1, tensor=8)) | {"model": with_llama(intermediate_size=60)},
        None,
        "dimension 60 is not divisible by mesh axes {'tensor': 8}",
    ),
    "a pattern": (changed("stages", 1, "trainable", ("lama",)), None, "pattern 'lama' matches no parameter"),
    "no pattern": (
        changed("stages", 1, "trainable", ("(",)),
        None,
        "pattern '(' is not a regular expression",
    ),
    "an objective": (
        changed("stages", 0, "objective", "contrastive"),
        None,
        "needs the model's text, contrastive",
    ),
    "a vocabulary": (
        changed("model", with_llama(vocab_size=400)),
        None,
        "model.llama.vocab_size is 400, but the tokenizer has 408 tokens",
    ),
    "no null dream": (
        changed("stages", 1, "data", "max_dreams", 0),
        None,
        "has no room for the empty prompt's",
    ),
    "no source": (
        changed("stages", 1, "data", dict(batch_size=8)),
        None,
        "data.source is not set",
    ),
    "no kind": (changed("stages", 1, "data", "source_options", "kinds", {}), None, "stage 'joint'"),
    "no tokenizer": (changed("tokenizer", {}), None, "tokenizer: the recipe does not name one"),
    "no held-out files": (
        changed("hooks", dict(eval_every=1))
        | {"stages": [{**STAGE, "data": dict(sources=[dict(format="pairs", path=__file__)], batch_size=8)}]},
        None,
        "hooks.eval_every needs held-out data, and the stage reads files",
    ),
    "held-out rows": (
        changed("hooks", dict(eval_every=1, validation={**STAGE["data"], "batch_size": 12})),
        None,
        "stage 'vae', validation: data.batch_size=12 is not divisible by",
    ),
    "no writer": (
        changed("hooks", dict(sample_every=1, sample_prompts=("a",))),
        None,
        "hooks.sample_every needs a model class",
    ),
    "a hook that is not one": (
        changed("hooks", dict(custom=("json:JSONDecoder",))),
        None,
        "a JSONDecoder; return",
    ),
    "no such hook": (changed("hooks", dict(custom=("json:Hook",))), None, "has no 'Hook'"),
    "no weights": (changed("init_from", "nowhere"), None, "nowhere does not exist"),
}


@pytest.mark.parametrize(("mapping", "until", "sentence"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_said_before_anything_happens(
    mapping, until, sentence, tmp_path, monkeypatch, devices
):
    monkeypatch.setattr(preparation, "init_on_host", None)
    monkeypatch.setattr(loop, "run_stage", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        loop.train(build_recipe(mapping), tmp_path / "work", until)
    message = str(error.value)
    assert sentence in message and message.endswith(".") and "\n" not in message
    assert not (tmp_path / "work").exists()


def test_an_unknown_key_of_a_recipe():
    with pytest.raises(
        ValueError, match=r"stages\[1\].optim: unknown key 'learning_rat'. Did you mean 'learn"
    ):
        build_recipe(changed("stages", 1, "optim", "learning_rat", 1.0))
