"""An optimizer from outside the package: one function in a user's own module, by import or by entry point."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamllm_jax.config.train import MeshConfig, OptimConfig, Recipe, TokenizerConfig
from dreamllm_jax.sharding import make_mesh
from dreamllm_jax.train.optim import check_optimizer, make_optimizer
from dreamllm_jax.train.state import create_state, optimizer_shardings
from tests.train import tiny

THEIRS = """
import jax
import jax.numpy as jnp
import optax


def lion(config):
    return optax.scale_by_lion(config.b1, config.b2)


def complete(config):
    return optax.adamw(config.learning_rate)


def wrong_type(config):
    return None


def failing(config):
    return optax.scale_by_polyak()


def one_vector(config):
    def init(params):
        return jnp.zeros(sum(p.size for p in jax.tree.leaves(params)))

    return optax.GradientTransformation(init, lambda grads, state, params=None: (grads, state))


def by_row(config):
    def init(params):
        return {"row": jax.tree.map(lambda p: jnp.zeros(p.shape[:1]), params)}

    return optax.GradientTransformation(init, lambda grads, state, params=None: (grads, state))


def with_key(config):
    return optax.chain(optax.add_noise(1e-9, 0.55, 0), optax.scale_by_adam())
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's module `their_optimizers`, in a package that is installed under the short name `lion`."""
    (tmp_path / "their_optimizers.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dreamllm_jax.optimizers]\nlion = their_optimizers:lion\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_optimizers", None)


@pytest.mark.parametrize("name", ["their_optimizers:lion", "lion"])
def test_a_recipe_may_name_it(project, name):
    """Clipping comes before it, weight decay after it, as with the built-in ones."""
    config = OptimConfig(optimizer=name, b1=0.9, b2=0.99, weight_decay=0.1)
    check_optimizer(config)
    params = {"a/kernel": jnp.array([2.0, -4.0]), "a/bias": jnp.array([1.0])}
    grads = {"a/kernel": jnp.array([3.0, -1.0]), "a/bias": jnp.array([4.0])}
    tx = make_optimizer(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], [1 + 0.1 * 2.0, -1 - 0.1 * 4.0], rtol=1e-6)
    np.testing.assert_allclose(updates["a/bias"], [1.0], rtol=1e-6)


def test_a_stage_holds_its_state_where_the_parameters_are(project, params, devices):
    """On eight devices it is laid out as Adam's moments are, and its updates are those of one device."""
    stage = tiny.stage(trainable=("vision_projector", "llama/layers/.*/q_proj"), optim=dict(optimizer="lion"))
    recipe = Recipe("tiny", tiny.config(), (stage,), tokenizer=TokenizerConfig(path="x"))
    tx, results = make_optimizer(stage.optim), []
    for shape, chosen in ((MeshConfig(data=1, fsdp=8), devices), (MeshConfig(), devices[:1])):
        state = create_state(params, stage, recipe, make_mesh(shape, chosen))
        moments = optax.tree_utils.tree_get(state.opt_state, "mu")
        assert moments.keys() == state.trainable.keys()
        for path, value in state.trainable.items():
            assert moments[path].sharding == value.sharding, path
        grads = jax.tree.map(jnp.sin, state.trainable)
        updates, after = jax.jit(tx.update)(grads, state.opt_state, state.trainable)
        results.append((jax.device_get(updates), jax.device_get(optax.tree_utils.tree_get(after, "mu"))))
    (updates, moments), (alone, alone_moments) = results
    for path in updates:
        assert set(np.unique(np.abs(alone[path]))) <= {0.0, 1.0}  # Lion's updates are signs
        np.testing.assert_array_equal(updates[path], alone[path])
        np.testing.assert_allclose(moments[path], alone_moments[path], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "lyon",
            "Unknown optimizer 'lyon'; known: lion; for one of your own, write package.module:at",
        ),
        ("their optimizers:lion", "is not an importable name"),
    ],
)
def test_an_unknown_name_is_refused_by_the_recipe(project, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(optimizer=name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "the module 'their_optimizers' has no 'none'"),
        ("wrong_type", "returned NoneType; it must return an optax.GradientTransformation"),
        ("complete", "'their_optimizers:complete' points against the gradient; return the direction alone"),
        ("failing", r"'their_optimizers:failing' fails on a 2 x 2 matrix \(TypeError"),
    ],
)
def test_what_is_wrong_with_it_is_named_before_compilation(project, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_optimizer(OptimConfig(optimizer=f"their_optimizers:{name}"))


QUERIES = "llama/layers/self_attn/q_proj/kernel"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "one_vector",
            r"state 1 has shape \(16384,\) and belongs to no parameter; no rule says how to",
        ),
        ("by_row", rf"row/{QUERIES} has shape \(2,\) and belongs to a parameter of shape \(2, 64, 128\)"),
    ],
)
def test_a_state_that_cannot_be_sharded_is_refused(project, name, sentence, devices):
    tx = make_optimizer(OptimConfig(optimizer=f"their_optimizers:{name}"))
    params = {QUERIES: jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)}
    with pytest.raises(ValueError, match=sentence):
        optimizer_shardings(tx, params, make_mesh(MeshConfig(data=1, fsdp=8), devices))


def test_a_random_key_in_the_state_is_replicated(project, devices):
    tx = make_optimizer(OptimConfig(optimizer="their_optimizers:with_key"))
    params = {QUERIES: jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)}
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), devices)
    shardings = optimizer_shardings(tx, params, mesh)
    key = optax.tree_utils.tree_get(jax.eval_shape(tx.init, params), "rng_key")
    assert key is not None
    assert optax.tree_utils.tree_get(shardings, "rng_key").is_fully_replicated
    assert not optax.tree_utils.tree_get(shardings, "mu")[QUERIES].is_fully_replicated
