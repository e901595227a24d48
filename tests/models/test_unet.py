"""The U-Net against diffusers (forward, gradients); published sizes, remat, independent rows, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.towers import UNetConfig
from dreamllm_jax.models.unet import UNet, sinusoids

SMALL = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
}
SDXL_SMALL = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 6,
    "projection_class_embeddings_input_dim": 6 * 6 + 10,
}
# Small versions of the families of Stable Diffusion, each with its distinguishing options.
FAMILIES = {
    "sd15": {**SMALL, "layers_per_block": 2},
    "sd21": {**SMALL, "attention_head_dim": (1, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": SDXL_SMALL,
    "three_levels": {
        **SMALL,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": (1, 2, 3),
        "transformer_layers_per_block": (2, 1, 1),
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SD21 = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)


def example(config, sides=(8, 8), rows=2):
    """Returns latents, time steps (including the last), context and added conditions."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    added = None
    if config.pooled_text_dim is not None:
        sizes = jnp.asarray(rng.integers(0, 1024, size=(rows, 6)))
        added = {"text_embeds": normal(rows, config.pooled_text_dim), "time_ids": sizes}
    steps = jnp.asarray([999, 20, 500][:rows])
    return normal(rows, *sides, config.in_channels), steps, normal(rows, 5, config.cross_attention_dim), added


@pytest.fixture(scope="module")
def small(draw_params):
    config = UNetConfig(**SDXL_SMALL)
    return UNet(config), draw_params(UNet(config), *example(config))


def assert_close(actual, expected, tolerance):
    """Asserts a bound on the largest deviation of each array relative to its own largest value."""
    deviations = jax.tree.map(
        lambda a, e: float(jnp.abs(a - e).max() / jnp.maximum(jnp.abs(e).max(), 1e-3)), actual, expected
    )
    path, worst = max(jax.tree_util.tree_leaves_with_path(deviations), key=lambda leaf: leaf[1])
    assert worst < tolerance, (path, worst)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "sides"), [("sd15", (8, 8)), ("sd21", (7, 10)), ("sdxl", (8, 6)), ("three_levels", (9, 5))]
)
def test_parity_with_diffusers(family, sides, from_diffusers, randomize):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    module = randomize(UNet2DConditionModel(**FAMILIES[family]))
    config = UNetConfig.from_hf(dict(module.config))
    assert config == UNetConfig(**FAMILIES[family])
    latents, steps, context, added = example(config, sides)
    weights = np.random.default_rng(1).normal(size=latents.shape).astype(np.float32)

    def loss(params, latents, context):
        out = UNet(config).apply(params, latents, steps, context, added)
        return (out * weights).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(from_diffusers(module.state_dict()), latents, context)

    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (latents, context)]
    conditions = added and {name: torch.tensor(np.asarray(x)) for name, x in added.items()}
    expected = module(
        leaves[0].permute(0, 3, 1, 2),
        torch.tensor(np.asarray(steps)),
        leaves[1],
        added_cond_kwargs=conditions,
    ).sample.permute(0, 2, 3, 1)
    (expected * torch.tensor(weights)).sum().backward()

    assert_close(out, expected.detach().numpy(), 1e-5)
    assert_close(grads[1:], tuple(leaf.grad.numpy() for leaf in leaves), 3e-5)
    assert_close(grads[0], from_diffusers({n: p.grad for n, p in module.named_parameters()}), 1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(("width", "flip", "shift"), [(32, True, 0), (33, False, 1)])
def test_sinusoids_parity(width, flip, shift):
    torch = pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding

    steps = np.array([0, 1, 7.25, 499.5, 999], np.float32)
    expected = get_timestep_embedding(torch.tensor(steps), width, flip, shift).numpy()
    # An error in the last bit of a frequency becomes 6e-5 at t = 999.
    np.testing.assert_allclose(sinusoids(jnp.asarray(steps), width, flip, shift), expected, atol=6e-5)


@pytest.mark.parametrize(
    ("config", "count"),
    [(UNetConfig(), 859_520_964), (SD21, 865_910_724), (SDXL, 2_567_463_684)],
    ids=["sd15", "sd21", "sdxl"],
)
def test_published_parameter_counts(config, count):
    inputs = jax.eval_shape(lambda: example(config, rows=1))
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("policy", ["dots", "minimal", "full", "offload"])
def test_remat_changes_neither_parameters_nor_gradients(small, policy):
    module, params = small
    inputs = example(module.config)

    def gradients(module):
        loss = jax.grad(lambda p: (module.apply(p, *inputs) ** 2).sum())
        return jax.jit(loss)(params)

    lean = UNet(module.config, remat=policy)
    assert jax.tree.structure(jax.eval_shape(lean.init, jax.random.key(0), *inputs)) == jax.tree.structure(
        params
    )
    assert_close(gradients(lean), gradients(module), 1e-5)


def test_a_row_does_not_depend_on_the_others(small):
    module, params = small
    inputs = example(module.config)
    run = jax.jit(module.apply)
    alone = run(params, *jax.tree.map(lambda x: x[1:], inputs))
    np.testing.assert_allclose(alone, run(params, *inputs)[1:], atol=1e-5)


def test_bfloat16_is_near_float32(small):
    module, params = small
    inputs = example(module.config)
    out, expected = (
        jax.jit(UNet(module.config, dtype=dtype).apply)(params, *inputs)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert out.dtype == jnp.bfloat16
    assert_close(out.astype(jnp.float32), expected, 0.1)


def test_bad_input_is_named(small):
    module, params = small
    latents, steps, context, added = example(module.config)
    with pytest.raises(ValueError, match="in_channels=4"):
        module.apply(params, latents[..., :3], steps, context, added)
    with pytest.raises(ValueError, match="cross_attention_dim=12"):
        module.apply(params, latents, steps, context[..., :5], added)
    with pytest.raises(ValueError, match="time_ids"):
        module.apply(params, latents, steps, context)
    with pytest.raises(ValueError, match="text_embeds"):
        module.apply(params, latents, steps, context, {**added, "text_embeds": context[:, 0]})
    plain = UNet(UNetConfig(**SMALL))
    with pytest.raises(ValueError, match="no added conditions"):
        plain.init(jax.random.key(0), latents, steps, context, added)
    uneven = UNet(dataclasses.replace(plain.config, norm_num_groups=3))
    with pytest.raises(ValueError, match="norm_num_groups=3"):
        uneven.init(jax.random.key(0), latents, steps, context)
