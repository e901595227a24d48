"""The VAE against diffusers (encoder, decoder, gradients); published size, sampling, pixels, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.towers import VaeConfig
from dreamllm_jax.models.vae import Vae, diffusion_pixels, sample_latents, to_uint8

CONFIG = VaeConfig(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, sample_size=16)
PIXELS = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(2, 16, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def vae(draw_params):
    return Vae(CONFIG), draw_params(Vae(CONFIG), PIXELS)


def deviation(actual, expected):
    expected = jnp.asarray(expected)
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


@pytest.mark.parity
def test_parity_with_diffusers(from_diffusers, randomize):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    module = randomize(
        AutoencoderKL(
            block_out_channels=CONFIG.block_out_channels,
            layers_per_block=CONFIG.layers_per_block,
            norm_num_groups=CONFIG.norm_num_groups,
            sample_size=CONFIG.sample_size,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )
    )
    assert VaeConfig.from_hf(dict(module.config)) == CONFIG
    rng = np.random.default_rng(1)
    noise = jnp.asarray(rng.normal(size=(2, 4, 3, 4)), jnp.float32)
    weights = rng.normal(size=PIXELS.shape).astype(np.float32)

    def loss(params, pixels):
        moments = Vae(CONFIG).apply(params, pixels, method=Vae.encode)
        latents = sample_latents(moments, noise, 1.0)
        out = Vae(CONFIG).apply(params, latents, method=Vae.decode)
        return (out * weights).sum(), (moments, out)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (moments, out)), grads = run(from_diffusers(module.state_dict()), PIXELS)

    leaf = torch.tensor(np.asarray(PIXELS), requires_grad=True)
    posterior = module.encode(leaf.permute(0, 3, 1, 2)).latent_dist
    latents = posterior.mean + posterior.std * torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2)
    decoded = module.decode(latents).sample.permute(0, 2, 3, 1)
    (decoded * torch.tensor(weights)).sum().backward()
    expected = torch.cat([posterior.mean, posterior.logvar], 1).permute(0, 2, 3, 1)

    assert deviation(moments, expected.detach().numpy()) < 1e-5
    assert deviation(out, decoded.detach().numpy()) < 1e-5
    assert deviation(grads[1], leaf.grad.numpy()) < 3e-5
    wanted = from_diffusers({n: p.grad for n, p in module.named_parameters()})
    # The softmax does not depend on the bias of the keys, so the gradient of that is rounding noise.
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted))
    worst = jax.tree.map(lambda a, e: float(jnp.abs(a - e).max()) / largest, grads[0], wanted)
    assert max(jax.tree.leaves(worst)) < 3e-5


def test_published_parameter_count():
    pixels = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(Vae(VaeConfig()).init, jax.random.key(0), pixels)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 83_653_863


def test_shapes_and_clamped_variance(vae):
    module, params = vae
    params = jax.tree.map(lambda x: x, params)
    bias = jnp.array([0.0] * 4 + [1e3, -1e3, 0, 0])
    params["params"]["quant_conv"]["bias"] = bias
    moments = module.apply(params, PIXELS, method=Vae.encode)
    assert moments.shape == (2, 4, 3, 8)
    assert (moments[..., 4] == 20).all() and (moments[..., 5] == -30).all()
    assert module.apply(params, moments[..., :4], method=Vae.decode).shape == PIXELS.shape


def test_bfloat16_keeps_float32_moments(vae):
    module, params = vae
    half = Vae(CONFIG, dtype=jnp.bfloat16)
    moments = half.apply(params, PIXELS, method=Vae.encode)
    assert moments.dtype == jnp.float32
    assert half.apply(params, moments[..., :4], method=Vae.decode).dtype == jnp.bfloat16
    assert deviation(moments, module.apply(params, PIXELS, method=Vae.encode)) < 0.1


def test_latents_follow_mean_variance_and_scale():
    moments = jnp.concatenate([jnp.full((1, 2, 2, 4), 3.0), jnp.full((1, 2, 2, 4), np.log(4.0))], -1)
    noise = jnp.full((1, 2, 2, 4), -1.0)
    np.testing.assert_allclose(sample_latents(moments, noise, 0.5), jnp.full((1, 2, 2, 4), 0.5), rtol=1e-6)


def test_bytes_survive_the_way_to_pixels_and_back():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    pixels = diffusion_pixels(images)
    assert float(pixels.min()) == -1 and float(pixels.max()) == 1
    np.testing.assert_array_equal(to_uint8(pixels), images)
    assert to_uint8(jnp.array([[[-7.0, 9.0]]])).tolist() == [[[0, 255]]]


def test_bad_input_is_named(vae):
    module, params = vae
    with pytest.raises(ValueError, match="multiples of 4"):
        module.apply(params, PIXELS[:, :, :10], method=Vae.encode)
    with pytest.raises(ValueError, match="3 channels"):
        module.apply(params, PIXELS[..., :1], method=Vae.encode)
    with pytest.raises(ValueError, match="latent_channels=4"):
        module.apply(params, PIXELS, method=Vae.decode)
