"""Group normalization with SiLU compiled by the real TPU compiler: why it has no kernel of its own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from dreamllm_jax.aot.census import take_census
from dreamllm_jax.aot.hlo import parse
from dreamllm_jax.aot.topology import topology_devices
from dreamllm_jax.ops.norm import GroupNorm

# Cached programs cannot be loaded without their devices, so they are compiled again.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

SHAPE = (64, 64, 64, 320)  # Stable Diffusion's finest level; more than fits into a chip's VMEM
BYTES = 64 * 64 * 64 * 320 * 2  # in bfloat16


def traffic(function, number):
    """Returns the bytes that the compiled program moves to and from HBM on one chip."""
    sharding = SingleDeviceSharding(topology_devices("v5e:2x2")[0])
    inputs = [jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=sharding)] * number
    return take_census(parse(jax.jit(function).lower(*inputs).compile().as_text()), {"data": 1}).hbm


def test_xla_moves_no_more_than_a_kernel_would():
    """The forward pass reads x three times (mean, variance, normalization) and writes the result.

    The program of the gradient reads x twice for the statistics, x and the incoming gradient for two sums,
    both again for the result, and writes it: 7 arrays.
    """
    pytest.importorskip("libtpu", reason="libtpu is not installed (pip install 'dreamllm-jax[aot]')")
    norm = GroupNorm(32, 1e-5, dtype=jnp.bfloat16, silu=True)
    params = norm.init(jax.random.key(0), jnp.zeros((1, 2, 2, 320), jnp.bfloat16))

    def normed(x):
        return norm.apply(params, x)

    assert traffic(normed, 1) == pytest.approx(4 * BYTES, rel=1e-3)
    assert traffic(lambda x, d_out: jax.vjp(normed, x)[1](d_out), 2) == pytest.approx(7 * BYTES, rel=1e-3)
