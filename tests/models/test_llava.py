"""A small LLaVA-1.5 against transformers: our reading of its folder gives the same logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax.convert.recognize import open_checkpoint
from dreamllm_jax.models.dreamllm import DreamLLMModule
from dreamllm_jax.models.parameters import example_batch

IMAGE = 63
TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def batch_of(config, tokens, pixels):
    """Returns rows whose image tokens are the slots of their images, in order."""
    base, here = example_batch(config, *tokens.shape), tokens == IMAGE
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    slots = np.where(here, np.cumsum(here, axis=1) - 1, -1).astype(np.int32)
    count = int(here.sum(1).max()) // config.num_patches
    return dataclasses.replace(
        base,
        tokens=tokens.astype(np.int32),
        positions=positions,
        image_slots=slots,
        image_mask=np.ones((len(tokens), count), bool),
        images=pixels,
    )


@pytest.mark.parity
@pytest.mark.parametrize("pictures", [1, 2])
def test_logits_and_gradients(pictures, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TINY, image_size=28, patch_size=14, projection_dim=16),
        text_config=transformers.LlamaConfig(**TINY, vocab_size=64, num_key_value_heads=2),
        image_token_index=IMAGE,
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # larger than their initial values, so that every operation matters
        for parameter in theirs.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, IMAGE, (2, 20))
    for k in range(pictures):
        tokens[:, 3 + 7 * k : 7 + 7 * k] = IMAGE
    pixels = rng.normal(size=(2 * pictures, 3, 28, 28)).astype(np.float32)
    weights = rng.normal(size=(2, 20, 64)).astype(np.float32)
    given = torch.tensor(pixels, requires_grad=True)
    logits = theirs(input_ids=torch.tensor(tokens), pixel_values=given).logits
    (logits * torch.tensor(weights)).sum().backward()

    source = open_checkpoint(tmp_path)
    params = {path: jnp.asarray(t.read()) for path, t in source.params()[0].items()}
    module = DreamLLMModule(source.model)

    def loss(pixels):
        batch = jax.tree.map(jnp.asarray, batch_of(source.model, tokens, pixels))
        hidden = module.apply({"params": unflatten_dict(params, sep="/")}, batch, method=DreamLLMModule.read)
        out = module.apply({"params": unflatten_dict(params, sep="/")}, hidden, method=DreamLLMModule.logits)
        return (out * weights).sum(), out

    ours = jnp.asarray(np.moveaxis(pixels, 1, -1).reshape(2, pictures, 28, 28, 3))
    (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
    expected, wanted = logits.detach().numpy(), np.moveaxis(given.grad.numpy(), 1, -1).reshape(ours.shape)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(grad, wanted, atol=2e-5 * np.abs(wanted).max())
