"""The converted towers, one by one, against the arrays that the reference computed with the same weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.convert.dreamllm_files import configs_from_dreamllm, read_dreamllm
from dreamllm_jax.convert.engine import to_jax
from dreamllm_jax.convert.safetensors_files import read_safetensors
from dreamllm_jax.convert.shapes import expected_shapes
from dreamllm_jax.convert.storage import unflatten
from dreamllm_jax.models.clip import ClipVision
from dreamllm_jax.models.connectors import Projector
from dreamllm_jax.models.llama import Llama
from dreamllm_jax.models.unet import UNet
from dreamllm_jax.models.vae import Vae

BOUND = 1e-4


@pytest.fixture(scope="module", params=["dreamllm-a", "dreamllm-b"])
def case(request, golden):
    """(model config, parameters, the reference's arrays)."""
    settings = configs_from_dreamllm(golden / request.param / "checkpoint")
    parts, _ = read_dreamllm(golden / request.param / "checkpoint", settings)
    params, report = to_jax(parts, expected_shapes(settings.model))
    assert not report.faulty
    reference = read_safetensors(golden / request.param / "reference.safetensors")
    arrays = {path: jnp.asarray(tensor.read()) for path, tensor in params.items()}
    return settings.model, unflatten(arrays), lambda name: reference[name].read()


def channels_last(images: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=BOUND, rtol=1e-5)


def test_image_features(case):
    config, params, reference = case
    vision = ClipVision(config.vision)
    pixels = channels_last(reference("in.images"))
    states = vision.apply({"params": params["vision"]}, pixels, select_layer=config.vision_select_layer)
    projector = Projector(config.vision_projector, config.llama.hidden_size)
    close(
        projector.apply({"params": params["vision_projector"]}, states[:, 1:]),
        reference("out.image_features"),
    )


def test_logits_of_the_hidden_states(case):
    config, params, reference = case
    hidden, seen = reference("out.last_hidden_state"), reference("in.attention_mask") == 1
    logits = Llama(config.llama).apply({"params": params["llama"]}, jnp.asarray(hidden), method="logits")
    close(np.asarray(logits)[seen], reference("out.logits")[seen])


def test_vae_moments(case):
    config, params, reference = case
    pixels = channels_last(reference("in.images_dm"))
    moments = Vae(config.vae).apply({"params": params["vae"]}, pixels, method="encode")
    mean, logvar = jnp.split(moments, 2, axis=-1)
    close(mean, reference("out.vae_mean").transpose(0, 2, 3, 1))
    close(logvar, reference("out.vae_logvar").transpose(0, 2, 3, 1))


def test_unet_output(case):
    config, params, reference = case
    prediction = UNet(config.unet).apply(
        {"params": params["unet"]},
        channels_last(reference("out.unet_in")),
        jnp.asarray(reference("out.unet_t").astype(np.int32)),
        jnp.asarray(reference("out.unet_ctx")),
    )
    close(prediction, reference("out.unet_out").transpose(0, 2, 3, 1))


def test_condition_of_the_query_states(case):
    config, params, reference = case
    projector = Projector(config.condition_projector, config.unet.cross_attention_dim)
    slots = slots_of_queries(reference, config.num_dream_queries)
    states = jnp.asarray(reference("out.last_hidden_state")[slots])
    close(projector.apply({"params": params["condition_projector"]}, states), reference("out.unet_ctx"))


def slots_of_queries(reference, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, positions), each [dreams, Q]: what follows every <dream_start> (515 in the golden tokenizer)."""
    rows, starts = np.nonzero(reference("in.input_ids") == 515)
    return np.repeat(rows[:, None], queries, 1), starts[:, None] + 1 + np.arange(queries)
