"""What each remat policy recomputes, counted in the traced gradient."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dreamllm_jax.config.towers import ClipVisionConfig, LlamaConfig, UNetConfig
from dreamllm_jax.models.clip import ClipVision
from dreamllm_jax.models.llama import Llama
from dreamllm_jax.models.unet import UNet
from dreamllm_jax.ops import scan
from dreamllm_jax.ops.scan import POLICIES


def product_flops(jaxpr) -> int:
    """Returns the FLOPs of all matrix products and convolutions, multiplied by the lengths of their loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (inside, _), _ = equation.params["dimension_numbers"]
            length = math.prod(equation.invars[0].aval.shape[axis] for axis in inside)
            total += 2 * equation.outvars[0].aval.size * length
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[out]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(product_flops, jax.extend.core.jaxprs_in_params(equation.params)))
    return total


def llama(policy):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    ints = jnp.zeros((1, 24), jnp.int32)
    return Llama(config, remat=policy), (jnp.zeros((1, 24, 32)), ints, ints + 1)


def vision(policy):
    config = ClipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return ClipVision(config, remat=policy), (jnp.zeros((1, 32, 32, 3)), -1)


def unet(policy):
    config = UNetConfig(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=8,
        attention_head_dim=(2, 4),
    )
    return UNet(config, remat=policy), (jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), jnp.zeros((1, 4, 8)))


def gradient_flops(make, policy) -> int:
    module, inputs = make(policy)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return product_flops(
        jax.make_jaxpr(jax.grad(lambda p: module.apply(p, *inputs).astype(jnp.float32).sum()))(params).jaxpr
    )


@pytest.mark.parametrize("make", [llama, vision, unet])
def test_policies_recompute_what_they_say(make):
    flops = {policy: gradient_flops(make, policy) for policy in ("none", *POLICIES)}
    assert flops["none"] < flops["dots"] < flops["full"]
    assert flops["none"] < flops["minimal"] < flops["full"]
    assert flops["offload"] == flops["full"]
    # A gradient takes three passes. "full" adds a fourth through the layers.
    assert 1.15 < flops["full"] / flops["none"] <= 4 / 3


@pytest.mark.parametrize("make", [llama, vision, unet])
def test_offload_sends_every_layers_input_to_the_host(make):
    module, inputs = make("offload")
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: module.apply(p, *inputs).astype(jnp.float32).sum()))(params)
    assert "pinned_host" in str(jaxpr) or "Host" in str(jaxpr)


@pytest.mark.parametrize("make", [llama, vision])
@pytest.mark.parametrize("policy", ["none", "dots", "full"])
def test_layers_without_a_loop_compute_the_same(make, policy):
    """Values and gradients are equal. That remat still saves memory is seen in `test_gpu_guards.py`."""
    module, inputs = make(policy)
    params = module.init(jax.random.key(0), *inputs)

    def compiled(loop):
        one = module.clone(scan_layers=loop)

        def loss(p):
            return jnp.sin(one.apply(p, *inputs)).sum()

        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    looped, unrolled = compiled(True), compiled(False)
    for a, b in zip(jax.tree.leaves(looped(params)), jax.tree.leaves(unrolled(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert unrolled.as_text().count(" while(") < looped.as_text().count(" while(")


@pytest.mark.parametrize(
    ("platform", "fsdp", "policy", "loop"),
    [
        ("gpu", 1, "dots", False),
        ("gpu", 1, "none", False),
        ("gpu", 1, "full", True),
        ("gpu", 8, "dots", True),
        ("tpu", 1, "dots", True),
    ],
)
def test_where_layers_are_a_loop(platform, fsdp, policy, loop, monkeypatch):
    monkeypatch.setattr(scan, "platform", lambda: platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((fsdp,), ("fsdp",), (AxisType.Auto,))):
        assert scan.prefers_loop(policy) is loop


def test_layers_are_a_loop_without_a_mesh_except_on_gpus(monkeypatch):
    assert scan.prefers_loop("dots")
    monkeypatch.setattr(scan, "platform", lambda: "gpu")
    assert not scan.prefers_loop("dots")
