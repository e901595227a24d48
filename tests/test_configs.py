"""Every recipe, built abstractly at full size: towers of the published sizes, and what each stage trains."""

import ast
import collections
import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dreamllm_jax.config import presets
from dreamllm_jax.config.base import to_dict
from dreamllm_jax.config.recipe_files import load_recipe
from dreamllm_jax.config.towers import ClipTextConfig
from dreamllm_jax.config.train import Recipe, build_recipe
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.train.state import partition

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, HANDWRITING = ROOT / "configs", ROOT / "examples" / "handwriting" / "config.py"
NAMES = tuple(sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "common"))
STAGES = ("stage1_comprehension", "stage1_creation", "stage2", "stage3")

# What Vicuna (vocabulary and 8 special tokens), CLIP and Stable Diffusion have in PyTorch.
LLAMA = 6_738_415_616 + 8 * 4096 * 2
LLAMA_13B = 13_015_864_320 + 8 * 5120 * 2
VISION = 303_179_776
VISION_336 = VISION + (24**2 - 16**2) * 1024  # more positions
VAE = 83_653_863
QUERIES = 64 * 4096
MLP = (1024 + 1) * 4096 + (4096 + 1) * 4096
DREAMLLM = {
    "llama": LLAMA,
    "vision": VISION,
    "vision_projector": (1024 + 1) * 4096,
    "dream_queries": QUERIES,
    "condition_projector": 4096 * 1024,
    "unet": 865_910_724,
    "vae": VAE,
}
SIZES = {name: DREAMLLM for name in STAGES} | {
    "sdxl": {
        "llama": LLAMA,
        "vision": VISION,
        "vision_projector": MLP,
        "dream_queries": QUERIES,
        "condition_projector": 4096 * 2048,
        "global_projector": 4096 * 1280,
        "unet": 2_567_463_684,
        "vae": VAE,
    },
    "llava15": {"llama": LLAMA, "vision": VISION_336, "vision_projector": MLP},
    "dreamllm_13b": DREAMLLM
    | {
        "llama": LLAMA_13B,
        "vision_projector": (1024 + 1) * 5120,
        "dream_queries": 64 * 5120,
        "condition_projector": 5120 * 1024,
    },
}
CONNECTORS = 4_198_400 + 262_144 + 4_194_304
TRAINED = {
    "stage1_comprehension": {"stage1_comprehension": 4_198_400},
    "stage1_creation": {"stage1_creation": 262_144 + 4_194_304},
    "stage2": {"stage2": LLAMA + CONNECTORS},
    "stage3": {"stage3": LLAMA + CONNECTORS},
    "sdxl": {"stage1_creation": 262_144 + 8_388_608 + 5_242_880},
    "dreamllm_13b": {
        "stage1_comprehension": (1024 + 1) * 5120,
        "stage1_creation": 64 * 5120 + 5120 * 1024,
        **dict.fromkeys(("stage2", "stage3"), LLAMA_13B + (1024 + 1) * 5120 + 64 * 5120 + 5120 * 1024),
    },
    "llava15": {"align": 20_979_712, "instruct": LLAMA + 20_979_712},
}
# Published: learning rate, steps, loss weights of text and image.
PUBLISHED = {
    "stage1_comprehension": (2e-3, 29_000, 1.0, 0.0),
    "stage1_creation": (2e-3, 29_000, 0.0, 1.0),
    "stage2": (2e-5, 3_900, 1.0, 10.0),
    "stage3": (4e-5, 350, 1.0, 10.0),
}


@functools.cache
def load(name: str, arg: str = "") -> Recipe:
    return load_recipe(f"{CONFIGS / name}.py{arg}")


@functools.cache
def shapes(model):
    return abstract_params(model)


def count(params):
    return sum(leaf.size for leaf in params.values())


def plain(value):
    """Tuples as lists, so that a test can change what is inside."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def test_overrides_reach_what_a_value_is_derived_from():
    """`head_dim` and `num_key_value_heads` follow from other values, and go on to do so."""
    path = str(CONFIGS / "stage2.py")
    smaller = load_recipe(
        path, ["--config.model.llama.hidden_size=1024", "--config.model.llama.num_attention_heads=16"]
    )
    assert (smaller.model.llama.head_dim, smaller.model.llama.num_key_value_heads) == (64, 16)
    grouped = load_recipe(path, ["--config.model.llama.num_key_value_heads=8"])
    assert (grouped.model.llama.head_dim, grouped.model.llama.num_key_value_heads) == (128, 8)
    added = load_recipe(str(CONFIGS / "llava15.py"), ["--config.model.text.num_hidden_layers=2"])
    assert added.model.text == ClipTextConfig(num_hidden_layers=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_config_dict(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(CONFIGS))
    try:
        spec.loader.exec_module(module)
        config = module.get_config(None)
    finally:
        sys.path.remove(str(CONFIGS))
    assert isinstance(config, ConfigDict) and build_recipe(config) == load(name)


def test_every_recipe_is_known_here():
    assert set(NAMES) == set(SIZES)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_towers_have_the_published_sizes(name):
    sizes = collections.Counter()
    for path, leaf in shapes(load(name).model).items():
        sizes[path.split("/")[0]] += leaf.size
    assert dict(sizes) == SIZES[name]


@pytest.mark.parametrize("name", sorted(SIZES))
def test_stages_train_what_the_paper_trains(name):
    recipe = load(name)
    params = shapes(recipe.model)
    trained = {stage.name: count(partition(params, stage.trainable)[0]) for stage in recipe.stages}
    assert trained == TRAINED[name]


def test_the_handwriting_recipe_is_the_same_system_made_small():
    recipe = load_recipe(str(HANDWRITING))
    params, real = shapes(recipe.model), shapes(load("stage2").model)
    for stage in recipe.stages:
        trainable, frozen = partition(params, stage.trainable)
        assert trainable and (frozen or stage.objective != "joint")
    for name in STAGES:
        ours, theirs = recipe.stage(name), load(name).stages[0]
        trained = [
            {path.split("/")[0] for path in partition(paths, s.trainable)[0]}
            for paths, s in ((params, ours), (real, theirs))
        ]
        assert trained[0] == trained[1]
        assert (ours.loss.weight_lm, ours.loss.weight_vm) == (theirs.loss.weight_lm, theirs.loss.weight_vm)
    tops = {path.split("/")[0] for path in params}
    assert tops == {*DREAMLLM, "text", "contrastive"}  # stage 0 trains what the real system downloads

    def kinds(params, tower):  # the number of blocks and layers differs, and nothing else
        return {re.sub(r"_\d+/", "_N/", path) for path in params if path.startswith(f"{tower}/")}

    for tower in ("llama", "vision", "vision_projector", "condition_projector", "unet", "vae"):
        assert kinds(params, tower) == kinds(real, tower)


@pytest.mark.parametrize("name", STAGES)
def test_published_settings(name):
    (stage,) = load(name).stages
    rate, steps, lm, vm = PUBLISHED[name]
    optim = stage.optim
    assert (optim.learning_rate, stage.steps, stage.loss.weight_lm, stage.loss.weight_vm) == (
        rate,
        steps,
        lm,
        vm,
    )
    assert (optim.b1, optim.b2, optim.weight_decay, optim.warmup_ratio) == (0.9, 0.999, 0.0, 0.003)
    assert optim.schedule == "cosine" and stage.loss.snr_gamma is None and stage.loss.condition_dropout == 0
    model = load(name).model
    assert (
        model.dtype == "bfloat16"
        and model.remat.llama == model.remat.unet == "full"
        and model.schedule.prediction_type == "epsilon"
    )
    assert (model.num_dream_queries, model.num_patches, model.vision_select_layer) == (64, 256, -2)


@pytest.mark.parametrize("name", (*STAGES, "sdxl"))
def test_rows_divide_among_the_devices_of_the_paper(name):
    (stage,) = load(name).stages
    assert stage.data.batch_size % (128 * stage.optim.grad_accum_steps) == 0


def test_variants():
    assert load("stage2", ":/mnt/all").init_from == "/mnt/all/models/dreamllm-7b-stage1"
    assert load("stage2", ":/mnt/all").stages[0].data.sources[0].path == "/mnt/all/data/mmc4-core/*.jsonl"
    for arg, root in ((":released", "."), (":/mnt/all,released", "/mnt/all")):
        sources = load("stage3", arg).stages[0].data.sources
        assert [s.format for s in sources] == ["conversations", "pairs", "instructions"]
        assert all(s.path.startswith(f"{root}/data/") for s in sources)
    assert load("llava15").model.num_patches == 576
    assert load("sdxl").model.unet.pooled_text_dim == 1280 and load("sdxl").model.latent_size == 128


@pytest.mark.parametrize(
    "path", [*(CONFIGS / f"{name}.py" for name in NAMES), HANDWRITING], ids=lambda p: p.stem
)
def test_headers_tell_what_it_takes(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for word in ("Reproduces:", "Hardware", "ime:"):
        assert word in doc
    (command,) = re.findall(r"^Command: (.*)$", doc, re.MULTILINE)
    assert command.startswith("python ") and str(path.relative_to(ROOT)) in command


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (("wamrup",), 1, "unknown key 'wamrup'"),
        (("model", "vison"), {}, "model: unknown key 'vison'. Did you mean 'vision'"),
        (("stages", 0, "optim", "learning_rat"), 1.0, r"stages\[0\].optim: unknown key 'learning_rat'"),
        (
            ("stages", 0, "data", "sources", 0, "format"),
            "pear",
            r"sources\[0\]: Unknown format 'pear'; known: pairs;",
        ),
        (("stages", 0, "trainable"), "llama", "trainable: got 'llama'; expected a list"),
    ],
)
def test_a_wrong_key_is_named(where, value, sentence):
    mapping = plain(to_dict(load("stage2")))
    *path, key = where
    place = functools.reduce(lambda part, step: part[step], path, mapping)
    place[key] = value
    with pytest.raises(ValueError, match=sentence):
        build_recipe(mapping)


def test_a_pattern_that_trains_nothing_is_named():
    params = shapes(load("llava15").model)
    with pytest.raises(ValueError, match="'dream_queries' matches no parameter"):
        partition(params, ("llama", "dream_queries"))


def test_recipes_have_the_published_towers():
    for name, decoder in (("stage2", presets.SD_21_BASE), ("sdxl", presets.SDXL_BASE)):
        model = load(name).model
        assert (model.unet, model.vae, model.schedule) == (decoder.unet, decoder.vae, decoder.schedule), name
        assert model.vision == presets.CLIP_L14 and model.image_size == decoder.image_size
