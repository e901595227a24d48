"""Checks before anything is compiled: all recipes of the project pass, and unfit ones are refused."""

import dataclasses
from pathlib import Path

import jax
import pytest

from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.config.recipe_files import load_recipe
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train import recipe_checks
from dreamllm_jax.train.preparation import prepare_tokenizer
from dreamllm_jax.train.recipe_checks import check_recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, HANDWRITING = ROOT / "configs", ROOT / "examples" / "handwriting" / "config.py"
REAL = ("stage1_comprehension", "stage1_creation", "stage2", "stage3", "sdxl", "llava15", "dreamllm_13b")


def test_the_handwriting_recipe_passes():
    """Every stage, on one device."""
    recipe = load_recipe(str(HANDWRITING))
    mesh = make_mesh(recipe.mesh, jax.devices()[:1])
    check_recipe(recipe, recipe.stages, mesh, prepare_tokenizer(recipe))


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("shape", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_real_recipes_pass(name, shape, devices, monkeypatch):
    """At full size, without allocation. Their corpora are not available here, and not checked."""
    monkeypatch.setattr(recipe_checks, "check_source", lambda *_: None)
    recipe = load_recipe(str(CONFIGS / f"{name}.py"))
    check_recipe(recipe, recipe.stages, make_mesh(shape, devices), train_tokenizer(["one"], 300))


def test_a_kernel_that_the_devices_lack():
    recipe = load_recipe(str(HANDWRITING))
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, attention=AttentionConfig(unet="splash"))
    )
    mesh = make_mesh(recipe.mesh, jax.devices()[:1])
    with pytest.raises(ValueError, match="asks for 'splash', a kernel for TPUs, but the program is for cpu"):
        check_recipe(recipe, recipe.stages, mesh, prepare_tokenizer(recipe))


def test_a_sampler_that_is_unknown():
    """Also for a model that draws nothing yet: the name is saved with it."""
    recipe = load_recipe(str(HANDWRITING))
    recipe = dataclasses.replace(recipe, generation=dataclasses.replace(recipe.generation, sampler="plms"))
    mesh, tokenizer = make_mesh(recipe.mesh, jax.devices()[:1]), prepare_tokenizer(recipe)
    blind = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, unet=None, vae=None))
    for given in (recipe, blind):
        with pytest.raises(ValueError, match="generation: Unknown sampler 'plms'; known: ddim, ddpm"):
            check_recipe(given, [], mesh, tokenizer)


def test_rows_and_vocabularies_that_do_not_fit(devices, monkeypatch):
    monkeypatch.setattr(recipe_checks, "check_source", lambda *_: None)
    recipe = load_recipe(str(CONFIGS / "llava15.py"))
    mesh, tokenizer = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices), train_tokenizer(["one"], 300)
    uneven = dataclasses.replace(
        recipe.stages[0], data=dataclasses.replace(recipe.stages[0].data, batch_size=10)
    )
    with pytest.raises(
        ValueError, match="data.batch_size=10 is not divisible by the 4 devices along data and fsdp"
    ):
        check_recipe(recipe, [uneven], mesh, tokenizer)
    model = dataclasses.replace(recipe.model, llama=dataclasses.replace(recipe.model.llama, vocab_size=256))
    with pytest.raises(ValueError, match="llama.vocab_size is 256, but the tokenizer has 274"):
        check_recipe(dataclasses.replace(recipe, model=model), recipe.stages, mesh, tokenizer)


@pytest.mark.parametrize(
    ("replicated", "sentence"),
    [
        (("llama",), "mesh.replicated names 'llama', which this stage trains; .*remove it from the list"),
        (
            ("unet", "depth"),
            "names 'depth', which the model does not have; its frozen parts are unet, vae",
        ),
    ],
)
def test_only_frozen_parts_can_be_kept_whole(replicated, sentence, devices, monkeypatch):
    monkeypatch.setattr(recipe_checks, "check_source", lambda *_: None)
    recipe = load_recipe(str(CONFIGS / "stage2.py"))
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, replicated=replicated))
    with pytest.raises(ValueError, match=sentence):
        check_recipe(recipe, recipe.stages, make_mesh(MeshConfig(), devices), train_tokenizer(["one"], 300))
