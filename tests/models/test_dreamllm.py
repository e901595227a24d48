"""The composition: the contents of slots, the contribution of each tower, and absent towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax.config.model import AttentionConfig
from dreamllm_jax.models.clip import normalize_pixels
from dreamllm_jax.models.dreamllm import DreamLLMModule, fill_slots, query_states
from dreamllm_jax.models.parameters import abstract_params
from dreamllm_jax.models.vae import diffusion_pixels
from dreamllm_jax.ops.attention import selection
from tests.train import tiny


@pytest.fixture(scope="module")
def batch():
    made = tiny.packed(tiny.rows_of(tiny.documents(3 * tiny.ROWS - 1)))
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, tiny.random_params(tiny.config()))


@pytest.fixture(scope="module")
def apply(params):
    variables = {"params": unflatten_dict(params, sep="/")}
    return lambda *args, method: tiny.model().apply(variables, *args, method=method)


@pytest.fixture(scope="module")
def embeds(apply, batch):
    return np.asarray(apply(batch, method=DreamLLMModule.embed))


def test_every_slot_holds_what_it_should(apply, params, batch, embeds):
    features = np.asarray(apply(batch.images, method=DreamLLMModule.see))
    assert features.shape == (tiny.ROWS, 4, tiny.P, 64)
    table, queries = params["llama/embed_tokens/embedding"], params["dream_queries/dream_queries"]
    kinds = set()
    for b in range(tiny.ROWS):
        for position in range(tiny.LAYOUT.length):
            image, dream = int(batch.image_slots[b, position]), int(batch.dream_slots[b, position])
            if image >= 0:
                kind, expected = "image", features[b, image // tiny.P, image % tiny.P]
            elif dream >= 0:
                kind, expected = "dream", queries[dream % tiny.Q]
            else:
                kind, expected = "text", table[batch.tokens[b, position]]
            kinds.add(kind)
            np.testing.assert_allclose(embeds[b, position], expected, rtol=1e-5, atol=1e-6)
    assert kinds == {"image", "dream", "text"}


@pytest.mark.parametrize("tower", ["llama", "vision", "unet", "vae"])
def test_each_tower_attends_as_chosen_for_it(params, batch, tower, monkeypatch):
    """Shown by the tower that refuses, on a CPU, a kernel for TPUs."""
    monkeypatch.setattr(selection, "MIN_KERNEL_LENGTH", 1)
    model, pictures = tiny.config(), batch.dream_images[:, 0]
    latents = jnp.zeros((1, model.latent_size, model.latent_size, model.vae.latent_channels))
    context = jnp.zeros((1, 2, model.unet.cross_attention_dim))
    calls = {
        "llama": ("read", batch.replace(images=None)),
        "vision": ("see", batch.images),
        "unet": ("denoise", latents, jnp.zeros(1), context),
        "vae": ("encode_image", pictures),
    }

    def run(wanted):
        module = DreamLLMModule(dataclasses.replace(model, attention=AttentionConfig(**wanted)))
        method, *arguments = calls[tower]
        jax.eval_shape(
            lambda *x: module.apply({"params": unflatten_dict(params, sep="/")}, *x, method=method),
            *arguments,
        )

    run({name: "splash" for name in calls if name != tower})
    with pytest.raises(ValueError, match="asks for 'splash'"):
        run({tower: "splash"})


def test_pictures_as_bytes_or_normalized(apply, batch):
    images, dreams = batch.images[:, 0], batch.dream_images[:, 0]
    np.testing.assert_allclose(
        apply(images, method=DreamLLMModule.see),
        apply(normalize_pixels(images), method=DreamLLMModule.see),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        apply(dreams, method=DreamLLMModule.encode_image),
        apply(diffusion_pixels(dreams), method=DreamLLMModule.encode_image),
        rtol=1e-6,
    )


def test_pictures_do_not_reach_text_of_a_model_that_cannot_see(params, batch, embeds):
    blind = DreamLLMModule(tiny.config(vision=None))
    kept = {k: v for k, v in params.items() if not k.startswith("vision")}
    seen = np.asarray(batch.image_slots) >= 0
    found = np.asarray(
        blind.apply({"params": unflatten_dict(kept, sep="/")}, batch, method=DreamLLMModule.embed)
    )
    np.testing.assert_array_equal(found[~seen], embeds[~seen])
    assert (found[seen] == params["llama/embed_tokens/embedding"][tiny.SPECIAL.im_patch]).all() and seen.any()


def test_fill_slots():
    embeds, features = jnp.zeros((2, 4, 1)), jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    out = fill_slots(embeds, features, jnp.array([[-1, 2, 0, -1], [1, -1, -1, 2]]))
    np.testing.assert_array_equal(out[..., 0], [[0, 3, 1, 0], [5, 0, 0, 6]])


def test_query_states_are_in_the_order_of_the_dreams():
    hidden = jnp.arange(2.0 * 6).reshape(2, 6, 1)
    slots = jnp.array([[-1, 0, 1, -1, 2, 3], [2, 3, -1, -1, -1, -1]])
    states = query_states(hidden, slots, dreams=3, queries=2)
    assert states.shape == (2, 3, 2, 1)
    np.testing.assert_array_equal(states[..., 0], [[[1, 2], [4, 5], [0, 0]], [[0, 0], [6, 7], [0, 0]]])


def test_gradients_flow_to_the_states_that_were_taken():
    slots = jnp.array([[-1, 0, 1, -1]])
    taken = jax.grad(lambda h: query_states(h, slots, 2, 2).sum())(jnp.ones((1, 4, 1)))
    np.testing.assert_array_equal(taken[0, :, 0], [0, 1, 1, 0])


ABSENT = {
    "language alone": (dict(vision=None, unet=None, vae=None), {"llama"}),
    "reads images": (dict(unet=None, vae=None), {"llama", "vision", "vision_projector"}),
    "draws": (
        dict(vision=None),
        {"llama", "unet", "vae", "dream_queries", "condition_projector"},
    ),
    "draws alone": (dict(llama=None, vision=None), {"unet", "vae"}),
    "sees alone": (dict(llama=None, unet=None, vae=None), {"vision"}),
}


@pytest.mark.parametrize(("changes", "parts"), ABSENT.values(), ids=ABSENT)
def test_absent_towers_have_no_parameters(changes, parts):
    assert {path.split("/")[0] for path in abstract_params(tiny.config(**changes))} == parts


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_computation_is_in_the_dtype_of_the_config(params, batch, kind):
    model = DreamLLMModule(tiny.config(dtype=kind))
    hidden = jax.eval_shape(
        lambda: model.apply({"params": unflatten_dict(params, sep="/")}, batch, method=DreamLLMModule.read)
    )
    assert hidden.shape == (*batch.tokens.shape, 64) and hidden.dtype == kind
    assert {v.dtype for v in abstract_params(tiny.config(dtype=kind)).values()} == {jnp.dtype("float32")}


def test_the_slots_in_the_docstrings():
    embeds, features = jnp.arange(6.0)[None, :, None], 10 + jnp.arange(4.0)[None, :, None]
    filled = fill_slots(embeds, features, jnp.array([[-1, 0, 1, 2, 3, -1]]))
    np.testing.assert_array_equal(filled[0, :, 0], [0, 10, 11, 12, 13, 5])
    hidden = 1 + jnp.arange(5.0)[None, :, None]
    states = query_states(hidden, jnp.array([[-1, -1, 0, 1, -1]]), dreams=2, queries=2)
    np.testing.assert_array_equal(states[0, :, :, 0], [[3, 4], [0, 0]])
