"""Projectors against torch modules, their shapes, and invalid settings; the dream queries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.config.towers import ProjectorConfig
from dreamllm_jax.models.connectors import DreamQueries, GlobalProjector, Projector

FEATURES = 10
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 6)), jnp.float32)


def torch_modules(config):
    """Returns (our name, torch module) pairs in the order of use, as the reference builds each projector."""
    from torch import nn

    if config.kind == "conv":
        return [("conv_0", nn.Conv2d(6, FEATURES, 3, padding=1, bias=config.bias))]
    if config.kind == "sam":
        return [
            ("conv_0", nn.Conv2d(6, 512, 3, stride=2, padding=1, bias=config.bias)),
            ("conv_1", nn.Conv2d(512, 1024, 3, stride=2, padding=1, bias=config.bias)),
            ("linear_0", nn.Linear(1024, FEATURES, bias=config.bias)),
        ]
    linears = [nn.Linear(6 if i == 0 else FEATURES, FEATURES, bias=config.bias) for i in range(config.depth)]
    return [(f"linear_{i}", m) for i, m in enumerate(linears)]


def params_from(modules):
    params = {}
    for name, module in modules:
        weight = module.weight.detach().numpy()
        params[name] = {"kernel": weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T}
        if module.bias is not None:
            params[name]["bias"] = module.bias.detach().numpy()
    return {"params": params}


@pytest.mark.parity
@pytest.mark.parametrize(
    "config",
    [
        ProjectorConfig("linear", 1, True),
        ProjectorConfig("linear", 1, False),
        ProjectorConfig("mlp", 2, True),
        ProjectorConfig("mlp", 3, False),
        ProjectorConfig("conv", 1, True),
        ProjectorConfig("sam", 2, False),
    ],
    ids=lambda c: f"{c.kind}-{c.depth}-{c.bias}",
)
def test_projector_matches_torch(config):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    modules = torch_modules(config)
    out = torch.tensor(np.array(X))
    for i, (name, module) in enumerate(modules):
        if name.startswith("conv"):
            if out.ndim == 3:
                out = out.permute(0, 2, 1).reshape(2, 6, 4, 4)
            out = module(out)
        else:
            out = out.flatten(2).permute(0, 2, 1) if out.ndim == 4 else out
            out = module(torch.nn.functional.gelu(out) if i and config.kind == "mlp" else out)
    out = out.flatten(2).permute(0, 2, 1) if out.ndim == 4 else out
    ours = Projector(config, FEATURES).apply(params_from(modules), X)
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "outputs"),
    [
        (ProjectorConfig(), 36),
        (ProjectorConfig("mlp", 2), 36),
        (ProjectorConfig("conv"), 36),
        (ProjectorConfig("sam", 2), 4),  # side 6 -> 3 -> 2
    ],
)
def test_shapes_and_leading_axes(config, outputs):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 36, 6)), jnp.float32)
    model = Projector(config, FEATURES)
    y, params = jax.jit(model.init_with_output)(jax.random.key(0), x)
    assert config.num_outputs(36) == outputs
    assert y.shape == (2, 3, outputs, FEATURES)
    np.testing.assert_allclose(y[1, 2], jax.jit(model.apply)(params, x[1, 2]), rtol=1e-5, atol=1e-5)


def test_sam_counts_what_it_makes():
    model = Projector(ProjectorConfig("sam", 2, bias=False), 3)
    for side in (1, 2, 5, 7, 8):
        x = jnp.zeros((1, side**2, 2))
        shape = jax.eval_shape(lambda x=x: model.init_with_output(jax.random.key(0), x)[0]).shape
        assert shape == (1, model.config.num_outputs(side**2), 3)


def test_bad_settings_are_sentences():
    for config in (("linear", 2), ("mlp", 1), ("conv", 2), ("sam", 1)):
        with pytest.raises(ValueError, match=f"kind '{config[0]}' has depth={config[1]}; it needs"):
            ProjectorConfig(*config)
    model = Projector(ProjectorConfig("conv"), 4)
    with pytest.raises(ValueError, match="17 patches; it needs a square number"):
        model.init(jax.random.key(0), jnp.zeros((1, 17, 4)))


def test_global_projector_is_linear_in_the_mean():
    model = GlobalProjector(5)
    params = model.init(jax.random.key(0), X)
    kernel = params["params"]["linear_0"]["kernel"]
    np.testing.assert_allclose(model.apply(params, X), X.mean(1) @ kernel, rtol=1e-5, atol=1e-5)


def test_dream_queries():
    model = DreamQueries(64, 32, std=0.1, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0))
    queries = params["params"]["dream_queries"]
    assert queries.shape == (64, 32) and queries.dtype == jnp.float32
    np.testing.assert_allclose(queries.std(), 0.1, rtol=0.1)
    assert model.apply(params).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_projector_begins_as_small_as_it_is_told(kind):
    """Outputs start at the scale of the embeddings, or they would dominate what the layers add to them."""
    init = nn.initializers.normal(0.02)
    model = Projector(ProjectorConfig(kind), 64, kernel_init=init)
    out, _ = model.init_with_output(jax.random.key(0), jax.random.normal(jax.random.key(1), (8, 16, 64)))
    inputs = 64 * (1 if kind == "linear" else 9)
    assert 0.6 < float(out.std()) / (0.02 * inputs**0.5) < 1.1
